"""What a test does with the page, in a word each."""

from __future__ import annotations

import time
from collections.abc import Callable

from playwright.sync_api import Locator, Page


def ask(page: Page, prompt: str = "What now?") -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Ask").click()


def column(page: Page, model: str) -> Locator:
    return page.get_by_role("article", name=f"Answer of {model}", exact=True)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that the server sees and the page does not."""
    ends = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < ends, "it did not happen within 5 seconds"
        time.sleep(0.005)


def chosen(page: Page) -> list[str]:
    boxes: list[str] = page.eval_on_selector_all("#models input:checked", "boxes => boxes.map(box => box.value)")
    return boxes
