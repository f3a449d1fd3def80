"""The report: one HTML file that needs nothing else, to be opened, mailed or kept beside the run."""

from __future__ import annotations

from pathlib import Path

from metier.reports.cost import cost
from metier.reports.data import ReportData
from metier.reports.foresight import foresight
from metier.reports.headline import headline
from metier.reports.markup import Markup, join, tag
from metier.reports.quality import general, quality
from metier.reports.routing import routing
from metier.reports.rows import rows
from metier.reports.samples import samples
from metier.reports.settings import settings
from metier.reports.training import training

_STYLE = Path(__file__).with_name("style.css")
# Nothing may be fetched and no script may run, whatever a reply says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write `report.html`; the folder is made if it is missing. Returns the file's path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(data), encoding="utf-8")
    return path


def render(data: ReportData) -> str:
    """The page as text. Parts that the data lacks are replaced by a sentence."""
    parts = join([_header(data), *(part(data) for part in _PARTS)])
    return page(data.title, parts, version=data.versions.get("metier"), note="Intervals are 95%.")


def page(title: str, content: Markup, *, version: str | None, note: str) -> str:
    """A whole page: one file that fetches nothing and runs nothing.

    Args:
        title: of the window.
        content: what stands between header and footer.
        version: of the metier that makes it.
        note: a sentence for the footer.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} · metier"),
        # Ours, and CSS: escaping would break its selectors.
        tag("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    footer = tag("footer", "Made by metier", f" {version}" if version else None, f". {note}")
    body = tag("body", tag("main", content), footer)
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


_PARTS = (headline, routing, training, rows, quality, general, cost, foresight, samples, settings)


def _header(data: ReportData) -> Markup:
    facts = [
        join((tag("span", name), " ", tag("b", value)))
        for name, value in (("model", data.model), ("task", data.task))
        if value
    ]
    return tag(
        "header",
        tag("p", "metier", class_="wordmark"),
        tag("h1", data.title),
        tag("p", *(tag("span", fact, class_="fact") for fact in facts), class_="facts") if facts else None,
        tag("p", data.task_description, class_="lead") if data.task_description else None,
    )
