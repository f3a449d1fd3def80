"""A headless browser and a stub server for a folder of tests; without a browser they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from serving.page.stub_server import StubServer

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

OpenPage = Callable[..., Page]


# not longer than a module: an event loop of Playwright's runs as long, and no test could run another
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def running_server() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.close()


@pytest.fixture
def server(running_server: StubServer) -> Iterator[StubServer]:
    yield running_server
    running_server.release.set()
    running_server.reset()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complained of: errors on the console, uncaught exceptions, breaches of the policy."""
    return []


@pytest.fixture
def open_page(browser: Browser, server: StubServer, complaints: list[str]) -> Iterator[OpenPage]:
    """Opens the page in a fresh profile once its list of models is there. Any complaint that a test leaves fails it."""
    contexts = []

    def open_page(
        fragment: str = "", *, waits: bool = True, offline_paths: Sequence[str] = (), **profile: object
    ) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **profile})
        context.set_default_timeout(5000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        for path in offline_paths:
            page.route(server.url + path, lambda route: route.abort())
        if offline_paths:
            page.clock.install()
        page.goto(server.url + fragment)
        if waits:
            page.wait_for_selector("#models label")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
