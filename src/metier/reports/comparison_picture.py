"""The comparison's picture: score against each cost, a row a task, the front drawn and ties filled alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from metier.evaluation.comparison.results import Row
from metier.evaluation.comparison.statistics import front
from metier.reports.blocks import metric_title

Axis = tuple[str, str, Callable[[Row], float | None]]


def draw(rows_by_task: Mapping[str, Sequence[Row]], axes: Sequence[Axis], path: Path) -> None:
    """Write a PNG; methods are numbered as in the tables, and named below."""
    width, height = 4.2 * len(axes), 3.6 * len(rows_by_task) + 1.6
    figure, grid = plt.subplots(
        len(rows_by_task), len(axes), figsize=(width, height), squeeze=False, layout="constrained"
    )
    for line, (task, rows) in enumerate(rows_by_task.items()):
        for column, (_, title, value) in enumerate(axes):
            _panel(grid[line][column], rows, value, title, f"{task}: {metric_title(rows[0].metric)}")
    named = {row.number: row.label for rows in rows_by_task.values() for row in rows if not row.is_base}
    labels = [f"{number} {label}" for number, label in sorted(named.items())]
    figure.supxlabel("\n".join("   ".join(labels[start : start + 6]) for start in range(0, len(labels), 6)), fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _panel(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None], title: str, name: str) -> None:
    base = next(row for row in rows if row.is_base)
    known = [(row.number, row, float(cost)) for row in rows if not row.is_base and (cost := value(row)) is not None]
    axes.axhline(base.score.value, color="0.6", linewidth=1, linestyle=":")
    for number, row, cost in known:
        color = "#0b5cad" if row.is_tied_with_best else "#5b6470"
        below, above = row.score.value - row.score.low, row.score.high - row.score.value
        axes.errorbar(cost, row.score.value, yerr=[[below], [above]], fmt="o", color=color, markersize=4, linewidth=0.7)
        axes.annotate(str(number), (cost, row.score.value), textcoords="offset points", xytext=(4, 3), fontsize=8)
    best = [known[index] for index in front([(cost, row.score.value) for _, row, cost in known])]
    costs, scores = [cost for *_, cost in best], [row.score.value for _, row, _ in best]
    axes.step(costs, scores, where="post", color="#a8410b", linewidth=1)
    if costs and min(costs) > 0 and max(cost for *_, cost in known) / min(costs) > 20:
        axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.set_ylabel(name)
