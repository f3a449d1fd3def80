"""The page's picture. Of the stub server into nowhere, or, on demand, of a server that runs into docs/:

    METIER_PAGE_PICTURE='http://127.0.0.1:8000/#m=embedded&m=synopsis' METIER_PAGE_PROMPT='…' \\
        python -m pytest tests/serving/page/test_picture.py

The address names the models to ask; docs/serving-page.png is written anew.
"""

from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import Browser, expect

from serving.page.actions import ask
from serving.page.stub_server import StubServer

WIDTH = 1200
ANSWERS_WITHIN_MS = 120_000


def test_a_picture_of_a_finished_question(browser: Browser, server: StubServer, tmp_path: Path) -> None:
    address = os.environ.get("METIER_PAGE_PICTURE")
    picture = tmp_path / "page.png" if address is None else Path(__file__).parents[3] / "docs" / "serving-page.png"
    page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
    page.goto(address or server.url)
    page.wait_for_selector("#models label")
    ask(
        page,
        os.environ.get("METIER_PAGE_PROMPT", "Translate to Slovak: a library that reads and writes JSON documents"),
    )
    expect(page.get_by_role("button", name="Stop all")).to_be_disabled(timeout=ANSWERS_WITHIN_MS)
    expect(page.locator(".state.bad")).to_have_count(0)
    page.mouse.move(0, 0)
    page.locator("#prompt").blur()
    page.screenshot(path=picture, full_page=True)
    page.close()
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == WIDTH
