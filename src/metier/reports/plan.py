"""A plan to look at: bytes by kind of every method as stacked bars, as a PNG picture or an HTML page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from metier import __version__
from metier.errors import ConfigError
from metier.planning.plan import Plan, Row
from metier.planning.spelling import count, size
from metier.planning.table import kinds_of
from metier.reports.blocks import section, table
from metier.reports.html import page
from metier.reports.markup import Markup, join, tag
from metier.reports.plots import legend_key

PROCESS, HOST = "process", "host"
COLORS = {
    PROCESS: "#5b6470",
    "frozen weights": "#0b5cad",
    "fetched weights": "#7db4e6",
    "gathered weights": "#b7c9dc",
    "trained weights": "#a8410b",
    "gradients": "#e08a4f",
    "gradients sent": "#f2c7a5",
    "optimizer state": "#8a6100",
    "activations": "#0a6e5c",
    "temporaries": "#7cc4b3",
    HOST: "#7a3fa0",
}
"""Apart for the colour-blind; the order is that of the bars, from the left."""
_WIDTH, _BAR, _GAP, _LEFT, _RIGHT = 720, 26, 14, 170, 90
Parts = dict[str, int]
"""Bytes by kind, in the order of `COLORS`."""


def save_chart(plan: Plan, path: Path) -> None:
    """Draw a plan's memory; runs whose bytes are not known have no bar.

    Args:
        plan: of one run or several.
        path: ends in .png or .html; its folder is made if it is missing.

    Raises:
        ConfigError: it ends in something else, or no run has a bar.
    """
    check_chart(path)
    bars = [(row, _parts(plan, row)) for row in plan.rows if row.estimate is not None]
    if not bars:
        raise ConfigError(f"{path}: none of the plan's runs has bytes to draw: {plan.rows[0].why_not}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        _save_picture(plan, bars, path)
    else:
        path.write_text(_page(plan, bars), encoding="utf-8")


def check_chart(path: Path) -> None:
    """Raises:
    ConfigError: it is no place for a chart.
    """
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"chart: got {str(path)!r}, expected a file that ends in .png or .html.")
    check_output(path, option="chart", example="plan.png")


def check_output(path: Path, *, option: str = "output", example: str = "plan.json") -> None:
    """Raises:
    ConfigError: no file can be written there.
    """
    folder = next(one for one in path.absolute().parents if one.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{option}: got {str(path)!r}, which cannot be written; expected a file's name, such as {example}."
        )


def _parts(plan: Plan, row: Row) -> Parts:
    assert row.estimate is not None, "asked for only where bytes are known"
    estimate = row.estimate
    parts = {
        PROCESS: plan.budget.runtime_bytes,
        **{kind: estimate.device_bytes[kind] for kind in kinds_of(plan)},
        HOST: estimate.host_bytes,
    }
    return {kind: parts[kind] for kind in COLORS if parts.get(kind)}


def _spans(parts: Parts) -> Iterator[tuple[str, int, int]]:
    """Each kind with where it begins and how long it is."""
    start = 0
    for kind, num_bytes in parts.items():
        yield kind, start, num_bytes
        start += num_bytes


def _name(row: Row) -> str:
    assert row.estimate is not None, "asked for only where bytes are known"
    return row.name if row.estimate.trace is not None else f"{row.name}, no activations"


def _limit(plan: Plan, bars: list[tuple[Row, Parts]]) -> int | None:
    """Memory that there is, where it would not dwarf the bars."""
    most = max(sum(parts.values()) for _, parts in bars)
    return plan.budget.device_bytes if plan.budget.device_bytes <= 1.5 * most else None


def _limit_name(plan: Plan) -> str:
    return "memory" if plan.budget.host_bytes is None else "device"


def _title(plan: Plan) -> str:
    return f"{plan.rows[0].config.model}: memory at the peak of a step"


def _save_picture(plan: Plan, bars: list[tuple[Row, Parts]], path: Path) -> None:
    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, parts in bars:
        for kind, start, num_bytes in _spans(parts):
            axes.barh(_name(row), num_bytes / 2**30, left=start / 2**30, color=COLORS[kind])
    keys: list[Artist] = [Patch(color=COLORS[kind], label=kind) for kind in _shown(bars)]
    limit = _limit(plan, bars)
    if limit is not None:
        line = axes.axvline(limit / 2**30, color="black", linewidth=1, linestyle="--", label=_limit_name(plan))
        keys.append(line)
    axes.invert_yaxis()
    axes.set(xlabel="GiB", title=_title(plan))
    axes.legend(handles=keys, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def _shown(bars: list[tuple[Row, Parts]]) -> list[str]:
    return [kind for kind in COLORS if any(kind in parts for _, parts in bars)]


def _page(plan: Plan, bars: list[tuple[Row, Parts]]) -> str:
    shown = _shown(bars)
    head = ["method", "fits", *shown, "in all", "trained", "delta"]
    body = [
        [
            row.name,
            row.verdict,
            *(size(parts.get(kind, 0)) for kind in shown),
            size(sum(parts.values())),
            count(row.estimate.state.num_trained) if row.estimate else "",
            size(row.estimate.delta_bytes) if row.estimate else "",
        ]
        for row, parts in bars
    ]
    reasons = [tag("p", f"{row.name}: {row.why_not}") for row in plan.rows if row.why_not]
    changes = [tag("p", f"{row.name} fits with {row.change}.") for row, _ in bars if row.change is not None]
    best = plan.recommended
    content = join(
        (
            tag("header", tag("p", "metier", class_="wordmark"), tag("h1", _title(plan))),
            section(
                "Bytes by kind",
                tag("figure", _legend(shown), _bars(plan, bars)),
                lead=None
                if best is None
                else f"{best.name} had the highest score of what fits, {plan.measured.where}.",
            ),
            section("In numbers", table(head, body), *changes, *reasons),
            section("Assumed", *(tag("p", said) for said in plan.assumptions)) if plan.assumptions else None,
        )
    )
    return page(_title(plan), content, version=__version__, note="Foreseen from the configuration alone.")


def _legend(shown: list[str]) -> Markup:
    return tag("div", *(legend_key(kind, COLORS[kind]) for kind in shown), class_="legend")


def _bars(plan: Plan, bars: list[tuple[Row, Parts]]) -> Markup:
    limit = _limit(plan, bars)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(limit or 0, *(sum(parts.values()) for _, parts in bars))
    height = (_BAR + _GAP) * len(bars) + 2 * _GAP
    marks: list[Markup] = []
    for number, (row, parts) in enumerate(bars):
        top, total = _GAP + number * (_BAR + _GAP), sum(parts.values())
        marks.append(tag("text", _name(row), x=_LEFT - 8, y=top + 18, text_anchor="end"))
        for kind, start, num_bytes in _spans(parts):
            x, width, style = f"{_LEFT + start * scale:.1f}", f"{num_bytes * scale:.1f}", f"fill:{COLORS[kind]}"
            marks.append(tag("rect", x=x, y=top, width=width, height=_BAR, style=style))
        marks.append(tag("text", size(total), x=f"{_LEFT + total * scale + 6:.1f}", y=top + 18))
    if limit is not None:
        x, style = f"{_LEFT + limit * scale:.1f}", "stroke:currentColor;stroke-dasharray:4"
        marks.append(tag("line", x1=x, x2=x, y1=0, y2=height - _GAP, style=style))
        named = f"{size(limit)} of {_limit_name(plan)}"
        marks.append(tag("text", named, x=x, y=height - 2, text_anchor="middle"))
    label = f"Memory by kind of {len(bars)} methods"
    return tag("svg", *marks, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=label, class_="chart")
