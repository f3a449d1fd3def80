"""The same test items with every method's reply, for a look at what the scores are made of."""

from __future__ import annotations

from collections.abc import Mapping

from metier.evaluation.result import SampleReply
from metier.reports.blocks import color_of, method_names, missing, section
from metier.reports.data import ReportData, method_title
from metier.reports.markup import Markup, tag

_MAX_SAMPLES = 5


def samples(data: ReportData) -> Markup:
    """The first few items that any evaluation kept: prompt, reference, and one reply a method."""
    title = "Sample replies"
    given = {
        name: {sample.origin: sample for sample in evaluation.samples} for name, evaluation in data.evaluations.items()
    }
    origins = list(dict.fromkeys(origin for of_method in given.values() for origin in of_method))
    if not origins:
        return section(title, missing("No sample replies were kept."))
    names = method_names(data)
    return section(title, *(_card(origin, given, names) for origin in origins[:_MAX_SAMPLES]))


def _card(origin: str, given: Mapping[str, Mapping[str, SampleReply]], names: list[str]) -> Markup:
    replies = {name: of_method[origin] for name, of_method in given.items() if origin in of_method}
    first = next(iter(replies.values()))
    lines = [_line("Reference", first.reference, color="#1c2430", note=None)]
    for name, sample in replies.items():
        is_exact = sample.reply.strip() == sample.reference.strip()
        note = "same as the reference" if is_exact else None
        lines.append(_line(method_title(name), sample.reply, color=color_of(name, names), note=note))
    return tag(
        "article",
        tag("p", origin, class_="origin"),
        tag("pre", first.prompt.strip(), class_="prompt", tabindex="0"),
        tag("dl", *lines),
        class_="sample",
    )


def _line(name: str, reply: str, *, color: str, note: str | None) -> Markup:
    shown = tag("span", reply) if reply.strip() else tag("em", "(empty reply)")
    mark = None if note is None else tag("span", "✓", class_="exact", title=note)
    return tag("div", tag("dt", name, style=f"color:{color}"), tag("dd", shown, mark))
