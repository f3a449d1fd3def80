"""The analysis of routing profiles as one HTML page: concentration, shared experts, drift."""

# L MoE layers, E experts

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from metier import __version__
from metier.reports import units
from metier.reports.blocks import section, table
from metier.reports.data import ReportData
from metier.reports.heatmap import heat_map, shade
from metier.reports.html import page
from metier.reports.markup import Child, Markup, join, tag
from metier.reports.plots import Line, line_chart
from metier.routing.analysis import Analysis, SharedExperts
from metier.routing.drift import Drift
from metier.routing.routing_profile import RoutingProfile

MEASURED = {"token": "routed tokens", "gate": "gate mass", "output_norm": "output norms"}


def write_analysis(folder: str | Path, analysis: Analysis, profiles: Mapping[str, RoutingProfile]) -> Path:
    """Write `analysis.html` and `analysis.json` into a folder, which is made if it is missing; returns the page's path.

    Args:
        folder: where to.
        analysis: of `profiles`.
        profiles: by name, whose scores are drawn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"metier_version": __version__, **analysis.to_dict()}
    (folder / "analysis.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    path = folder / "analysis.html"
    path.write_text(render_analysis(analysis, profiles), encoding="utf-8")
    return path


def render_analysis(analysis: Analysis, profiles: Mapping[str, RoutingProfile]) -> str:
    """The page as text."""
    rows = {name: profile.scores_LE(analysis.score).tolist() for name, profile in profiles.items()}
    header = tag(
        "header",
        tag("p", "metier", class_="wordmark"),
        tag("h1", "What the router does"),
        tag(
            "p",
            f"{len(rows)} profiles of {len(analysis.layer_ids)} MoE layers with {analysis.num_experts} experts; "
            f"a layer’s scores are shares of its {MEASURED[analysis.score]}.",
            class_="lead",
        ),
    )
    parts = [header, _concentration(analysis, rows)]
    if analysis.shared:
        parts.append(_shared(analysis))
    parts += [_drift(name, drift, analysis.top) for name, drift in analysis.drifts.items()]
    parts.append(_maps(analysis, rows))
    note = "Concentration and shared experts as in the ESFT paper, arXiv:2407.01906, figures 2 and 3."
    return page("Routing", join(parts), version=__version__, note=note)


def _concentration(analysis: Analysis, rows: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    num_experts = analysis.num_experts
    uniform = [(0.0, 0.0), (float(num_experts), 1.0)]
    lines = [Line(name="uniform routing", points=uniform, color="#5b6470", kind="dashed")]
    lines += [Line(name=name, points=_mean_curve(rows[name]), color=_color(i)) for i, name in enumerate(rows)]
    chart = line_chart(
        lines,
        x_title="experts of a layer, most used first",
        y_title="share covered, mean of layers",
        label="How much of a layer's routing its most used experts cover.",
    )
    by_layer = [
        Line(
            name=name,
            points=[(float(i), s) for i, s in zip(analysis.layer_ids, facts.top_share[analysis.top], strict=True)],
            color=_color(number),
        )
        for number, (name, facts) in enumerate(analysis.profiles.items())
    ]
    layers = line_chart(
        by_layer,
        x_title="decoder layer",
        y_title=f"share of the top {analysis.top}",
        label=f"Share of routing that each layer's top {analysis.top} experts hold.",
    )
    ranks = sorted({rank for facts in analysis.profiles.values() for rank in facts.top_share})
    top_ps = list(next(iter(analysis.profiles.values())).num_selected)
    head: list[Child] = ["profile", "tokens", "halves agree"]
    head += [f"top {rank}" for rank in ranks] + [f"p={top_p:g}" for top_p in top_ps]
    body: list[list[Child]] = []
    for name, facts in analysis.profiles.items():
        shares = [units.share(sum(facts.top_share[rank]) / len(facts.top_share[rank])) for rank in ranks]
        agree = units.MISSING if facts.reliability is None else f"{facts.reliability:.2f}"
        sizes = [units.number(facts.num_selected[top_p], digits=1) for top_p in top_ps]
        body.append([name, units.count(facts.num_tokens), agree, *shares, *sizes])
    uniform_row: list[Child] = ["if uniform", units.MISSING, units.MISSING]
    uniform_row += [units.share(rank / num_experts) for rank in ranks]
    body.append([*uniform_row, *(units.number(float(-(-top_p * num_experts // 1)), digits=1) for top_p in top_ps)])
    return section(
        "How concentrated",
        tag("div", chart, layers, class_="pair"),
        table(head, body),
        lead="The fewer experts cover a task, the less has to be trained. “Halves agree” is the Jaccard overlap of "
        "what two halves of the text select at p = 0.2: under 0.9, profile more text. Under “p” stand the experts "
        "of a layer that it takes to cover that share.",
    )


def _mean_curve(rows_LE: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    curve, covered = [(0.0, 0.0)], 0.0
    ranked = [sorted(row, reverse=True) for row in rows_LE]
    for rank in range(len(ranked[0])):
        covered += sum(row[rank] for row in ranked) / len(ranked)
        curve.append((float(rank + 1), covered))
    return curve


def _shared(analysis: Analysis) -> Markup:
    names = list(analysis.profiles)
    found: dict[tuple[str, str], SharedExperts] = {}
    for pair in analysis.shared:
        found[pair.first, pair.second] = found[pair.second, pair.first] = pair
    body: list[list[Child]] = []
    for row in names:
        cells: list[Child] = [row]
        for column in names:
            mean = float(analysis.top) if row == column else found[row, column].mean
            share = mean / analysis.top
            ink = "#fff" if share > 0.55 else "inherit"
            cells.append(tag("span", f"{mean:.1f}", class_="tile", style=f"background:{shade(share)};color:{ink}"))
        body.append(cells)
    lines = [
        Line(
            name=f"{pair.first}, {pair.second}",
            points=[(float(i), float(n)) for i, n in zip(analysis.layer_ids, pair.by_layer, strict=True)],
            color=_color(number),
            kind="plain" if len(analysis.shared) <= 6 else "faint",
        )
        for number, pair in enumerate(analysis.shared)
    ]
    ends = [float(analysis.layer_ids[0]), float(analysis.layer_ids[-1])]
    chance = analysis.shared[0].chance
    lines.append(Line(name="chance", points=[(end, chance) for end in ends], color="#5b6470", kind="dashed"))
    chart = line_chart(
        lines,
        x_title="decoder layer",
        y_title=f"shared of the top {analysis.top}",
        label="How many top experts two profiles share, by layer.",
    )
    return section(
        "What tasks share",
        tag("div", table(["", *names], body), chart, class_="pair"),
        lead=f"How many of a layer’s top {analysis.top} experts two profiles have in common, mean over layers. "
        f"Two random sets share {chance:.1f}.",
    )


def _drift(name: str, drift: Drift, top: int) -> Markup:
    moved = [(float(layer.layer), layer.moved_share) for layer in drift.layers]
    divergence = [(float(layer.layer), layer.divergence) for layer in drift.layers]
    chart = line_chart(
        [
            Line(name="share that went elsewhere", points=moved, color="#0b5cad"),
            Line(name="Jensen-Shannon divergence, bits", points=divergence, color="#a8410b"),
        ],
        x_title="decoder layer",
        y_title="0: the same routing",
        label=f"How far routing moved from {name}, by layer.",
    )
    body: list[list[Child]] = [
        [
            f"layer {move.layer}, expert {move.expert}",
            units.share(move.before),
            units.share(move.after),
            units.signed(100 * move.change, digits=1),
        ]
        for move in drift.moves[:12]
    ]
    mean = sum(layer.moved_share for layer in drift.layers) / len(drift.layers)
    kept = sum(layer.num_shared_top for layer in drift.layers) / len(drift.layers)
    return section(
        f"Drift: {name}",
        tag("div", chart, table(["moved most", "before", "after", "points"], body), class_="pair"),
        lead=f"{units.share(mean)} of routing went to other experts, mean over layers; of each layer’s top {top} "
        f"experts {kept:.1f} stayed.",
    )


def _maps(analysis: Analysis, rows: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    maps = [
        join((tag("h3", name), heat_map(ReportData(title=name, scores_LE=scores, layer_ids=analysis.layer_ids))))
        for name, scores in rows.items()
    ]
    return section("Every expert", *maps, lead="Darker experts get more of their layer.")


def _color(position: int) -> str:
    """A colour of its own for each of many names."""
    palette = ("#0b5cad", "#a8410b", "#0a6e5c", "#7a3fa0", "#8a6100", "#b0246b", "#3f6212", "#444cc0")
    return palette[position % len(palette)]
