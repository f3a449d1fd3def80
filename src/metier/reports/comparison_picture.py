"""The comparison's picture: score against each cost, a row a task, the front drawn and ties filled alike."""

from __future__ import annotations

from collections import defaultdict
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


def draw(
    rows_by_task: Mapping[str, Sequence[Row]], axes: Sequence[Axis], path: Path, *, colors: tuple[str, str], key: str
) -> None:
    """Write a PNG; methods are numbered as in the tables, and named below.

    Args:
        rows_by_task: what is drawn, a line of panels a task.
        axes: a panel each.
        path: of the file.
        colors: of what is on a front, and of the rest.
        key: what colours and shapes say, below the picture.
    """
    named = {row.number: row.label for rows in rows_by_task.values() for row in rows if not row.is_base}
    labels = [f"{number} {label}" for number, label in sorted(named.items())]
    lines = [key, *("   ".join(labels[start : start + 6]) for start in range(0, len(labels), 6))]
    below = 0.8 + 0.17 * len(lines)
    width, height = 4.2 * len(axes), 3.6 * len(rows_by_task) + below
    # in inches, for a layout that is looked for draws everything twice
    space = {"left": 0.7 / width, "right": 1 - 0.15 / width, "bottom": below / height, "top": 1 - 0.15 / height}
    figure, grid = plt.subplots(
        len(rows_by_task), len(axes), figsize=(width, height), squeeze=False,
        gridspec_kw={**space, "wspace": 0.2, "hspace": 0.25},
    )  # fmt: skip
    for line, (task, rows) in enumerate(rows_by_task.items()):
        for column, (_, title, value) in enumerate(axes):
            _panel(grid[line][column], rows, value, title, f"{task}: {metric_title(rows[0].metric)}", colors)
    figure.supxlabel("\n".join(lines), fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _panel(
    axes: Axes,
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    title: str,
    name: str,
    colors: tuple[str, str],
) -> None:
    base = next(row for row in rows if row.is_base)
    known = [(row.number, row, float(cost)) for row in rows if not row.is_base and (cost := value(row)) is not None]
    axes.axhline(base.score.value, color="0.6", linewidth=1, linestyle=":")
    on_front = front([(cost, row.score.value) for _, row, cost in known])
    alike = defaultdict[tuple[str, str], list[tuple[Row, float]]](list)
    for index, (number, row, cost) in enumerate(known):
        alike[colors[index not in on_front], "s" if row.is_tied_with_best else "o"].append((row, cost))
        axes.annotate(str(number), (cost, row.score.value), textcoords="offset points", xytext=(4, 3), fontsize=8)
    for (color, shape), points in alike.items():
        values = [row.score.value for row, _ in points]
        beyond = [
            [row.score.value - row.score.low for row, _ in points],
            [row.score.high - row.score.value for row, _ in points],
        ]
        axes.errorbar(
            [cost for _, cost in points], values, yerr=beyond, fmt=shape, color=color, markersize=4, linewidth=0.7
        )
    best = [known[index] for index in on_front]
    costs, scores = [cost for *_, cost in best], [row.score.value for _, row, _ in best]
    axes.step(costs, scores, where="post", color=colors[0], linewidth=1)
    if costs and min(costs) > 0 and max(cost for *_, cost in known) / min(costs) > 20:
        axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.set_ylabel(name)
