"""The heat map of expert scores by layer, with the selected experts marked."""

# L MoE layers, E experts

from __future__ import annotations

import math
from collections.abc import Sequence

from metier.reports import units
from metier.reports.data import ReportData
from metier.reports.markup import Markup, join, tag

# ColorBrewer "Blues": one hue, even steps of lightness, readable in print and by the colour-blind.
_RAMP = (
    (247, 251, 255),
    (222, 235, 247),
    (198, 219, 239),
    (158, 202, 225),
    (107, 174, 214),
    (66, 146, 198),
    (33, 113, 181),
    (8, 81, 156),
    (8, 48, 107),
)
_EXPERTS_WITH_GAPS = 96


def shade(value: float) -> str:
    """The ramp's colour at `value` in [0, 1], as #rrggbb; values outside are clipped, NaN is grey."""
    if math.isnan(value):
        return "#d0d0d0"
    position = min(max(value, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    rest = position - index
    mixed = (round(a + rest * (b - a)) for a, b in zip(_RAMP[index], _RAMP[index + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def heat_map(data: ReportData) -> Markup:
    """Rows of layers, columns of experts, darker where the task uses them more; a ring marks the selected."""
    assert data.scores_LE is not None, "a heat map needs scores"
    assert data.layer_ids is not None, "a heat map needs layer ids"
    finite = [score for row in data.scores_LE for score in row if math.isfinite(score)]
    highest = max(finite, default=0.0) or 1.0
    num_experts = len(data.scores_LE[0])
    rows = [
        _layer(layer, row, highest, None if data.selected is None else data.selected.get(layer, ()))
        for layer, row in zip(data.layer_ids, data.scores_LE, strict=True)
    ]
    selected = data.selected or {}
    num_selected = sum(len(set(experts)) for experts in selected.values())
    label = f"Heat map of {len(rows)} layers by {num_experts} experts."
    if data.selected is not None:
        label += f" {num_selected} experts are selected; the table below lists them."
    return tag(
        "figure",
        tag("div", join(rows), _axis(num_experts), class_="heat", role="img", aria_label=label),
        _legend(highest, is_marked=bool(selected), has_selection=data.selected is not None),
        class_="wide" if num_experts <= _EXPERTS_WITH_GAPS else "wide dense",
    )


def _layer(layer: int, scores_E: Sequence[float], highest: float, experts: Sequence[int] | None) -> Markup:
    chosen = set(experts or ())
    cells = [
        tag(
            "i",
            class_="cell on" if expert in chosen else "cell",
            style=f"background:{shade(score / highest)}",
            title=f"layer {layer}, expert {expert}: {score:.4f}{', selected' if expert in chosen else ''}",
        )
        for expert, score in enumerate(scores_E)
    ]
    covered = sum(scores_E[expert] for expert in chosen)
    return tag(
        "div",
        tag("span", str(layer), class_="heat-layer"),
        tag("span", join(cells), class_="cells", style=f"--experts:{len(scores_E)}"),
        tag(
            "span",
            None if experts is None else tag("b", str(len(chosen))),
            tag("span", f" · {units.share(covered)}") if chosen else None,
            class_="heat-cover",
        ),
        class_="heat-row",
    )


def _axis(num_experts: int) -> Markup:
    step = next((step for step in (4, 8, 16, 32, 64, 128) if num_experts / step <= 8), 256)
    marks = [
        tag("span", str(expert), style=f"left:{100 * (expert + 0.5) / num_experts:.3f}%")
        for expert in range(0, num_experts, step)
    ]
    return tag(
        "div",
        tag("span", class_="heat-layer"),
        tag("span", join(marks), class_="heat-axis"),
        tag("span", class_="heat-cover"),
        class_="heat-row",
    )


def _legend(highest: float, *, is_marked: bool, has_selection: bool) -> Markup:
    stops = ",".join(shade(position / 8) for position in range(9))
    return tag(
        "figcaption",
        tag(
            "span",
            "share of the layer's routing  0",
            tag("span", class_="ramp", style=f"background:linear-gradient(90deg,{stops})"),
            f"{highest:.2f}",
            class_="key",
        ),
        tag("span", tag("i", class_="ring"), "selected and trained", class_="key") if is_marked else None,
        tag(
            "span",
            "left: decoder layer; below: expert"
            + ("; right: selected, and the share they cover" if has_selection else ""),
            class_="key",
        ),
    )
