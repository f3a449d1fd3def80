"""Which experts the task uses: heat map, concentration, reliability and the selection in words."""

# L MoE layers, E experts

from __future__ import annotations

import math
from collections.abc import Sequence

from metier.reports import units
from metier.reports.blocks import missing, section, table
from metier.reports.data import ReportData
from metier.reports.heatmap import heat_map
from metier.reports.markup import Child, Markup, tag
from metier.reports.plots import Line, line_chart


def routing(data: ReportData) -> Markup:
    """Heat map, concentration and reliability of the routing, and the selected experts."""
    title = "Which experts the task uses"
    if data.scores_LE is None or data.layer_ids is None:
        return section(title, missing("No routing profile was given, so there is no heat map."))
    measured = "gate mass" if data.score_name == "gate" else "routed tokens"
    tokens = "" if data.num_profiled_tokens is None else f" over {units.count(data.num_profiled_tokens)} tokens"
    rule = (
        ""
        if data.top_p is None
        else f" In each layer the top experts are taken until they cover {units.share(data.top_p)}."
    )
    return section(
        title,
        heat_map(data),
        tag("div", _concentration(data), _routing_figures(data), class_="pair"),
        _selection_table(data),
        lead=f"Each expert’s share of its layer’s {measured}{tokens}.{rule}",
    )


def _concentration(data: ReportData) -> Markup:
    assert data.scores_LE is not None, "concentration needs scores"
    num_experts = len(data.scores_LE[0])
    curves = [_cumulative(row) for row in data.scores_LE]
    mean = [sum(curve[rank] for curve in curves) / len(curves) for rank in range(num_experts)]

    def points(curve: Sequence[float]) -> list[tuple[float, float]]:
        return [(0.0, 0.0), *((float(rank + 1), value) for rank, value in enumerate(curve))]

    lines = [Line(name="", points=points(curve), color="#0b5cad", kind="faint") for curve in curves]
    uniform = [(rank + 1) / num_experts for rank in range(num_experts)]
    lines.append(Line(name="uniform routing", points=points(uniform), color="#5b6470", kind="dashed"))
    lines.append(Line(name="mean of layers", points=points(mean), color="#0b5cad"))
    return line_chart(
        lines,
        x_title="experts of a layer, most used first",
        y_title="share of routing covered",
        label="How much of a layer's routing its most used experts cover, against uniform routing.",
    )


def _cumulative(scores_E: Sequence[float]) -> list[float]:
    total, curve = 0.0, []
    for score in sorted((score if math.isfinite(score) else 0.0 for score in scores_E), reverse=True):
        total += score
        curve.append(total)
    return curve


def _routing_figures(data: ReportData) -> Markup:
    assert data.scores_LE is not None, "figures need scores"
    num_experts = len(data.scores_LE[0])
    curves = [_cumulative(row) for row in data.scores_LE]
    ranks = [1, data.top_k or min(6, num_experts), 2 * (data.top_k or min(6, num_experts))]
    body: list[list[Child]] = [
        [
            f"top {rank} of {num_experts}",
            units.share(sum(curve[rank - 1] for curve in curves) / len(curves)),
            units.share(rank / num_experts),
        ]
        for rank in dict.fromkeys(rank for rank in ranks if rank <= num_experts)
    ]
    return tag(
        "div",
        tag("h3", "Concentration"),
        table(["experts", "share of routing", "if uniform"], body),
        tag("h3", "Reliability"),
        _reliability(data.reliability),
    )


def _reliability(value: float | None) -> Markup:
    if value is None:
        return missing("Reliability was not measured.")
    verdict = (
        "The selection is stable: more text would change little."
        if value >= 0.9
        else "Under 0.9: profile more text before trusting single experts."
    )
    return tag(
        "p",
        "Two halves of the text, profiled apart, select sets with a Jaccard overlap of ",
        tag("b", f"{value:.2f}"),
        f" (1 is the same set). {verdict}",
        class_=None if value >= 0.9 else "warning",
    )


def _selection_table(data: ReportData) -> Markup:
    if not data.selected:
        return missing("No selection was given, so no expert is marked.")
    num_selected = sum(len(set(experts)) for experts in data.selected.values())
    num_experts = len(data.scores_LE[0]) if data.scores_LE else 0
    body: list[list[Child]] = [
        [str(layer), str(len(set(experts))), ", ".join(str(expert) for expert in sorted(set(experts)))]
        for layer, experts in sorted(data.selected.items())
    ]
    of = f" of {num_experts * len(data.layer_ids):,}" if data.layer_ids else ""
    return tag(
        "details",
        tag("summary", f"The {num_selected:,}{of} selected experts by layer"),
        table(["layer", "number", "experts"], body),
    )
