"""Blocks that all sections are built of: titles, tables, cells with intervals, a colour for each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metier.evaluation.result import Change, MetricScore
from metier.reports import units
from metier.reports.data import ReportData
from metier.reports.markup import Child, Markup, join, tag

# Dark enough for text on white (contrast at least 4.5), apart for the colour-blind.
_COLORS = {
    "base": "#5b6470",
    "esft": "#0b5cad",
    "full": "#a8410b",
    "expert_lora": "#8a6100",
    "lora": "#0a6e5c",
    "random": "#7a3fa0",
}
_MORE_COLORS = ("#b0246b", "#3f6212", "#444cc0")


def color_of(name: str, names: Sequence[str]) -> str:
    """A method's colour: the same in every chart of the page."""
    if name in _COLORS:
        return _COLORS[name]
    others = [other for other in names if other not in _COLORS]
    return _MORE_COLORS[others.index(name) % len(_MORE_COLORS)] if name in others else _COLORS["base"]


def method_names(data: ReportData) -> list[str]:
    """All methods of the report: in the order of the comparison, then the evaluations, then the curves."""
    return list(dict.fromkeys([*(row.name for row in data.rows), *data.evaluations, *data.metrics]))


def section(title: str, *children: Child, lead: Child = None) -> Markup:
    """A titled block with a sentence on what it shows."""
    return tag("section", tag("h2", title), None if lead is None else tag("p", lead, class_="lead"), *children)


def missing(sentence: str) -> Markup:
    """The sentence in place of a part that the run did not give."""
    return tag("p", sentence, class_="missing")


def table(head: Sequence[Child], body: Sequence[Sequence[Child]], *, highlight: int | None = None) -> Markup:
    """A table whose first column names the row; it scrolls sideways where the page is too narrow."""
    rows = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell) for cell in row[1:]),
            class_="highlight" if index == highlight else None,
        )
        for index, row in enumerate(body)
    ]
    header = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    return tag(
        "div",
        tag("table", tag("thead", header), tag("tbody", *rows)),
        class_="scroll",
        tabindex="0",
    )


def with_interval(text: str, low: float, high: float, *, write: Callable[[float], str]) -> Markup:
    """A value with its interval in small print."""
    return join((tag("span", text), tag("small", f" {write(low)} to {write(high)}", class_="interval")))


def score_cell(score: MetricScore | None) -> Child:
    """A score of 0 to 100 with its interval."""
    if score is None:
        return units.MISSING
    return with_interval(
        units.number(score.value, digits=1),
        score.low,
        score.high,
        write=lambda end: units.number(end, digits=1),
    )


def change_cell(change: Change | None, *, digits: int) -> Child:
    """A signed difference with its interval."""
    if change is None:
        return units.MISSING
    return with_interval(
        units.signed(change.value, digits=digits),
        change.low,
        change.high,
        write=lambda end: units.signed(end, digits=digits),
    )


def metric_title(metric: str) -> str:
    titles = {
        "exact_match": "Exact match",
        "json_exact_match": "JSON exact match",
        "rouge_l": "ROUGE-L",
        "chrf": "chrF",
    }
    return titles.get(metric, metric)
