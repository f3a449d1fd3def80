"""What each method cost beside what it gave: the comparison as one table."""

from __future__ import annotations

from metier.reports import units
from metier.reports.blocks import change_cell, missing, score_cell, section, table
from metier.reports.data import ReportData, method_title
from metier.reports.markup import Child, Markup, join, tag


def cost(data: ReportData) -> Markup:
    """The comparison as a table: quality beside trained parameters, stored bytes, time and memory."""
    title = "What it cost"
    if not data.rows:
        return section(title, missing("No comparison was given, so costs are not shown."))

    def part(value: int | None, whole: int | None, text: str) -> Child:
        if value is None or not whole:
            return text
        meter = tag("i", tag("i", style=f"width:{min(100.0, 100 * value / whole):.2f}%"), class_="meter")
        return join((text, tag("small", f" {units.share(value / whole, digits=1)}", class_="interval"), meter))

    body: list[list[Child]] = [
        [
            method_title(row.name),
            score_cell(row.score),
            change_cell(row.gain, digits=1),
            units.share(row.gain_share),
            change_cell(row.forgetting, digits=3),
            part(row.trainable_parameters, data.total_parameters, units.count(row.trainable_parameters)),
            part(row.delta_bytes, data.model_bytes, units.size(row.delta_bytes)),
            units.duration(row.train_seconds),
            units.size(row.peak_memory_bytes),
        ]
        for row in data.rows
    ]
    head: list[Child] = [
        "method",
        "task score",
        "gain",
        "of full’s gain",
        "forgetting",
        "trained",
        "stored",
        "training",
        "peak memory",
    ]
    highlight = next((index for index, row in enumerate(data.rows) if not row.is_base), None)
    whole = ""
    if data.total_parameters is not None:
        whole = f" The model has {units.count(data.total_parameters)} parameters"
        whole += f" in {units.size(data.model_bytes)}." if data.model_bytes is not None else "."
    return section(
        title, table(head, body, highlight=highlight), lead=f"Per cent are shares of the whole model.{whole}"
    )
