"""A page read back: for tests of what reports write."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br"}
# what a page is tested with wherever text can go
HOSTILE = "</pre><script>alert('x')</script><img src=https://evil.example/a onerror=alert(1)>\" ' & \x00 <b>"
ALLOWED_TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "footer",
    "section",
    "article",
    "figure",
    "figcaption",
    "details",
    "summary",
    "div",
    "span",
    "p",
    "h1",
    "h2",
    "h3",
    "b",
    "i",
    "em",
    "strong",
    "small",
    "pre",
    "dl",
    "dt",
    "dd",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "svg",
    "line",
    "circle",
    "polyline",
    "text",
}


class Page(HTMLParser):
    """Elements with their attributes and text; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())
