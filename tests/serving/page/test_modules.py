"""The page's modules that know nothing of the page: events out of pieces, and where two answers part."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from serving.page.stub_server import StubServer

READ = """async (pieces) => {
    const { Events } = await import("/page/events.js");
    const events = new Events();
    return pieces.map((piece) => events.read(piece));
}"""
DIFFER = """async ([text, other]) => (await import("/page/difference.js")).firstDifference(text, other)"""


@pytest.fixture(scope="module")
def modules(browser: Browser, running_server: StubServer) -> Page:
    page = browser.new_page()
    page.goto(running_server.url)
    return page


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_cut_out_of_pieces_of_any_size(modules: Page, line_end: str, size: int) -> None:
    text = ': a comment\n\nevent: x\ndata: one\n\ndata:two\ndata:  lines\n\n\ndata: {"a":\ndata: 1}\n\n: end\n'
    text = text.replace("\n", line_end)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    found = modules.evaluate(READ, pieces)
    assert [data for piece in found for data in piece] == ["one", "two\n lines", '{"a":\n1}']


def test_an_event_is_there_with_its_last_line(modules: Page) -> None:
    assert modules.evaluate(READ, ["data: a\n", "\ndata: b", "\n\n"]) == [[], ["a"], ["b"]]


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("a b c", "a b c", None),
        (" a  b\n", "a b", None),
        ("", "", None),
        ("a  bx c", "a b c", {"start": 3, "end": 5, "word": 2}),
        ("a b c", "a b", {"start": 4, "end": 5, "word": 3}),
        ("a b", "a b c", {"start": 3, "end": 3, "word": 3}),
    ],
)
def test_where_two_answers_part(modules: Page, text: str, other: str, expected: dict[str, Any] | None) -> None:
    assert modules.evaluate(DIFFER, [text, other]) == expected
