"""The top of the report: the run in one sentence and a few figures."""

from __future__ import annotations

from metier.evaluation.compare import ComparisonRow
from metier.reports import units
from metier.reports.blocks import metric_title, missing
from metier.reports.data import ReportData, method_title
from metier.reports.markup import Markup, join, tag


def headline(data: ReportData) -> Markup:
    """The run in one sentence and four figures, of the first method that was trained."""
    row = next((row for row in data.rows if not row.is_base), None)
    base = next((row for row in data.rows if row.is_base), None)
    if row is None or base is None:
        return missing("No comparison was given, so there are no figures to lead with.")
    tiles = []
    if row.score is not None and base.score is not None:
        value = f"{units.number(base.score.value, digits=1)} → {units.number(row.score.value, digits=1)}"
        tiles.append(("Task score", value, metric_title(row.score.metric)))
    if row.gain_share is not None:
        tiles.append(("Of full fine-tuning's gain", units.share(row.gain_share), "the same data and steps"))
    if row.forgetting is not None:
        value = units.signed(row.forgetting.value, digits=3)
        tiles.append(("Forgetting", value, "bits per byte on general text; 0 is none"))
    if row.delta_bytes is not None:
        of = "" if not data.model_bytes else f"{units.share(row.delta_bytes / data.model_bytes, digits=1)} of the model"
        tiles.append(("Stored", units.size(row.delta_bytes), of))
    return join(
        (
            tag("p", _summary(data, row), class_="summary"),
            tag(
                "div",
                *(
                    tag("div", tag("span", name), tag("b", value), tag("small", note), class_="tile")
                    for name, value, note in tiles
                ),
                class_="tiles",
            ),
        )
    )


def _summary(data: ReportData, row: ComparisonRow) -> Markup:
    clauses = []
    if row.trainable_parameters is not None and data.total_parameters:
        part = units.share(row.trainable_parameters / data.total_parameters, digits=1)
        clauses.append(f"trained {part} of the model’s parameters")
    if row.gain is not None:
        verb = "gained" if row.gain.value >= 0 else "lost"
        clauses.append(f"{verb} {units.number(abs(row.gain.value), digits=1)} points on the task")
    if row.forgetting is not None:
        full = next((one.forgetting for one in data.rows if one.name == "full" and one is not row), None)
        beside = "" if full is None else f" (full fine-tuning: {units.signed(full.value, digits=3)})"
        change = units.signed(row.forgetting.value, digits=3)
        clauses.append(f"changed the loss on general text by {change} bits per byte{beside}")
    sentence = ", ".join(clauses[:-1]) + (" and " if len(clauses) > 1 else "") + "".join(clauses[-1:])
    return join((tag("strong", method_title(row.name)), f" {sentence or 'was trained'}."))
