"""A plan to look at: bytes by kind of every method as stacked bars, as a PNG picture or an HTML page."""

from __future__ import annotations

from pathlib import Path

from metier import __version__
from metier.errors import ConfigError
from metier.planning.estimate import KINDS
from metier.planning.plan import Plan, Row, count, size
from metier.reports.blocks import section, table
from metier.reports.html import page
from metier.reports.markup import Markup, join, tag

PROCESS, HOST = "process", "host"
COLORS = {
    PROCESS: "#5b6470",
    "frozen weights": "#0b5cad",
    "fetched weights": "#7db4e6",
    "trained weights": "#a8410b",
    "gradients": "#e08a4f",
    "optimizer state": "#8a6100",
    "activations": "#0a6e5c",
    HOST: "#7a3fa0",
}
"""Apart for the colour-blind; the order is that of the bars, from the left."""
_WIDTH, _BAR, _GAP, _LEFT, _RIGHT = 720, 26, 14, 110, 90


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


def _parts(plan: Plan, row: Row) -> dict[str, int]:
    assert row.estimate is not None, "asked for only where bytes are known"
    estimate = row.estimate
    parts = {
        PROCESS: plan.budget.runtime_bytes,
        **{kind: estimate.device_bytes[kind] for kind in KINDS},
        HOST: estimate.host_bytes,
    }
    return {kind: num_bytes for kind, num_bytes in parts.items() if num_bytes}


def _limit(plan: Plan) -> tuple[str, int]:
    if plan.budget.host_bytes is None:
        return "memory", plan.budget.device_bytes
    return "device", plan.budget.device_bytes


def _title(plan: Plan) -> str:
    return f"{plan.rows[0].config.model}: memory at the peak of a step"


def _save_picture(plan: Plan, bars: list[tuple[Row, dict[str, int]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [row.config.method for row, _ in bars]
    for kind, color in COLORS.items():
        lefts = [sum(n for k, n in parts.items() if _is_before(k, kind)) / 2**30 for _, parts in bars]
        widths = [parts.get(kind, 0) / 2**30 for _, parts in bars]
        if any(widths):
            axes.barh(names, widths, left=lefts, color=color, label=kind)
    name, limit = _limit(plan)
    most = max(sum(parts.values()) for _, parts in bars)
    if limit <= 1.5 * most:
        axes.axvline(limit / 2**30, color="black", linewidth=1, linestyle="--", label=name)
    axes.invert_yaxis()
    axes.set(xlabel="GiB", title=_title(plan))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def _is_before(kind: str, other: str) -> bool:
    order = list(COLORS)
    return order.index(kind) < order.index(other)


def _page(plan: Plan, bars: list[tuple[Row, dict[str, int]]]) -> str:
    name, limit = _limit(plan)
    said = dict.fromkeys(said for row, _ in bars if row.estimate for said in row.estimate.assumptions)
    shown = [kind for kind in COLORS if any(kind in parts for _, parts in bars)]
    head = ["method", "fits", *shown, "in all", "trained", "delta"]
    body = [
        [
            row.config.method,
            "yes" if row.fits else "no" if row.lacking_bytes else "not known",
            *(size(parts.get(kind, 0)) for kind in shown),
            size(sum(parts.values())),
            count(row.estimate.state.num_trained) if row.estimate else "",
            size(row.estimate.delta_bytes) if row.estimate else "",
        ]
        for row, parts in bars
    ]
    left_out = [tag("p", f"{row.config.method}: {row.why_not}") for row in plan.rows if row.estimate is None]
    changes = [tag("p", f"{row.config.method} fits with {row.change}.") for row, _ in bars if row.change is not None]
    best = plan.recommended
    content = join(
        (
            tag("header", tag("p", "metier", class_="wordmark"), tag("h1", _title(plan))),
            section(
                "Bytes by kind",
                tag("figure", _legend(shown), _bars(bars, name, limit)),
                lead=None if best is None else f"{best.config.method} had the highest score of what fits.",
            ),
            section("In numbers", table(head, body), *changes, *left_out),
            section("Assumed", *(tag("p", sentence) for sentence in said)) if said else None,
        )
    )
    return page(_title(plan), content, version=__version__, note="Foreseen from the configuration alone.")


def _legend(shown: list[str]) -> Markup:
    keys = [tag("span", tag("b", "■ ", style=f"color:{COLORS[kind]}"), f"{kind} ") for kind in shown]
    return tag("div", *keys, class_="legend")


def _bars(bars: list[tuple[Row, dict[str, int]]], name: str, limit: int) -> Markup:
    most = max(sum(parts.values()) for _, parts in bars)
    has_limit = limit <= 1.5 * most
    scale = (_WIDTH - _LEFT - _RIGHT) / (max(most, limit) if has_limit else most)
    height = (_BAR + _GAP) * len(bars) + 2 * _GAP
    marks: list[Markup] = []
    for number, (row, parts) in enumerate(bars):
        top, x = _GAP + number * (_BAR + _GAP), float(_LEFT)
        marks.append(tag("text", row.config.method, x=_LEFT - 8, y=top + 18, text_anchor="end"))
        for kind in (kind for kind in COLORS if kind in parts):
            width = parts[kind] * scale
            marks.append(
                tag("rect", x=f"{x:.1f}", y=top, width=f"{width:.1f}", height=_BAR, style=f"fill:{COLORS[kind]}")
            )
            x += width
        marks.append(tag("text", size(sum(parts.values())), x=f"{x + 6:.1f}", y=top + 18))
    if has_limit:
        x = _LEFT + limit * scale
        style = "stroke:currentColor;stroke-dasharray:4"
        marks.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=0, y2=height - _GAP, style=style))
        marks.append(tag("text", f"{size(limit)} of {name}", x=f"{x:.1f}", y=height - 2, text_anchor="middle"))
    label = f"Memory by kind of {len(bars)} methods"
    return tag("svg", *marks, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=label, class_="chart")
