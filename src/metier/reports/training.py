"""How training went: the loss of each method over its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from metier.reports import units
from metier.reports.blocks import color_of, method_names, missing, section, table
from metier.reports.data import ReportData, method_title
from metier.reports.markup import Child, Markup, tag
from metier.reports.plots import Line, line_chart

_SMOOTHING = 0.9
_STEPS_TO_SMOOTH = 20


def training(data: ReportData) -> Markup:
    """Training loss of each method, smoothed over the raw values, and evaluation loss where it was logged."""
    title = "Training"
    names = method_names(data)
    lines: list[Line] = []
    body: list[list[Child]] = []
    num_skipped = 0
    for name, rows in data.metrics.items():
        color, shown = color_of(name, names), method_title(name)
        points, skipped = points_of(rows, "loss")
        evaluated, skipped_too = points_of(rows, "eval_loss")
        num_skipped += skipped + skipped_too
        if len(points) > _STEPS_TO_SMOOTH:
            lines.append(Line(name="", points=points, color=color, kind="faint"))
            points = _smooth(points)
        lines.append(Line(name=shown, points=points, color=color))
        lines.append(Line(name=f"{shown}, evaluation", points=evaluated, color=color, kind="dashed"))
        body.append([shown, _at_end(points, 0), _at_end(points, 1), _at_end(evaluated, 1)])
    if not any(line.points for line in lines):
        return section(title, missing("No training losses were given, so there are no loss curves."))
    note = f"{num_skipped} logged losses are not finite and are not drawn." if num_skipped else None
    chart = line_chart(lines, x_title="step", y_title="loss (nats per token)", label="Loss over training steps.")
    figures = table(["method", "steps", "last loss", "last evaluation loss"], body)
    return section(
        title,
        tag("div", chart, tag("div", figures, note and missing(note)), class_="pair"),
        lead="Bold: smoothed over about ten logged steps. Faint: each logged step.",
    )


def _at_end(points: Sequence[tuple[float, float]], axis: int) -> str:
    """The last step (axis 0) or loss (axis 1)."""
    return units.number(points[-1][axis] if points else None, digits=3 * axis)


def points_of(rows: Sequence[Mapping[str, object]], key: str) -> tuple[list[tuple[float, float]], int]:
    """Steps and what was logged under `key`; and how many values are not finite, which are left out."""
    points, num_skipped = [], 0
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if not isinstance(step, int | float) or not isinstance(value, int | float):
            continue
        if math.isfinite(value) and math.isfinite(step):
            points.append((float(step), float(value)))
        else:
            num_skipped += 1
    return points, num_skipped


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its start."""
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed.append((step, total / weight))
    return smoothed
