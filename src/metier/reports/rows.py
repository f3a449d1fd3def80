"""How the rows of a sparse adapter were used: how many a step, how evenly, and what was moved for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from metier.reports import units
from metier.reports.blocks import color_of, method_names, section, table
from metier.reports.data import ReportData, method_title
from metier.reports.markup import Child, Markup, join, tag
from metier.reports.plots import Line, line_chart
from metier.reports.training import points_of

_MARK = "rows_updated"
_SHARES = (0.1, 0.5, 0.9)
"""Of Key-Experts by their load."""
_BYTES = {
    "to the device": "row_bytes_to_device",
    "back": "row_bytes_from_device",
    "from the disk": "row_bytes_from_disk",
    "to the disk": "row_bytes_to_disk",
}


def rows(data: ReportData) -> Markup:
    """Rows that each step updated and the largest load of a Key-Expert; nothing for a run without such an adapter."""
    logged = {name: [line for line in lines if _MARK in line] for name, lines in data.metrics.items()}
    logged = {name: lines for name, lines in logged.items() if lines}
    if not logged:
        return join(())
    names = method_names(data)
    charts = [
        line_chart(
            [
                Line(name=method_title(n), points=points_of(x, key)[0], color=color_of(n, names))
                for n, x in logged.items()
            ],
            x_title="step",
            y_title=title,
            label=f"{title} over training steps.",
        )
        for key, title in ((_MARK, "rows updated"), ("key_expert_load_max", "largest load of a Key-Expert"))
    ]
    head: list[Child] = ["mean of a step", "rows updated", "touched", "Key-Experts unused", *_BYTES, "hits", "waiting"]
    body: list[list[Child]] = [
        [
            method_title(name),
            units.count(round(_mean(lines, _MARK))),
            units.size(round(_mean(lines, "row_bytes_touched"))),
            units.share(_mean(lines, "key_experts_unused"), digits=1),
            *(units.size(round(_mean(lines, key))) for key in _BYTES.values()),
            units.share(_mean(lines, "row_cache_hit_rate"), digits=1) if "row_cache_hit_rate" in lines[-1] else "",
            units.duration(_mean(lines, "row_stall_seconds")),
        ]
        for name, lines in logged.items()
    ]
    return section(
        "Rows",
        tag("div", *charts, class_="pair"),
        table(head, body),
        _loads_table(data.key_expert_tokens) if data.key_expert_tokens else None,
        lead="Of all layers. A Key-Expert's load is its tokens over the mean Key-Expert's; 1 everywhere is even.",
    )


def _loads_table(tokens: Mapping[str, Sequence[int]]) -> Markup:
    """How evenly each layer's Key-Experts were used since training began, or was resumed."""
    head: list[Child] = ["load of Key-Experts", "unused", "least", *(f"{share:.0%}" for share in _SHARES), "largest"]
    body: list[list[Child]] = []
    for path, counts in tokens.items():
        # over the mean's; a layer that no token reached has loads of 0
        mean = sum(counts) / len(counts) or 1.0
        found = sorted(count / mean for count in counts)
        middle = [found[round(share * (len(found) - 1))] for share in _SHARES]
        cells = [f"{load:.2f}" for load in (found[0], *middle, found[-1])]
        body.append([_layer_name(path), f"{list(counts).count(0)} of {len(counts)}", *cells])
    return table(head, body)


def _layer_name(path: str) -> str:
    """A module's path from the number of its layer on."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(0, first - 1) :])


def _mean(lines: Sequence[Mapping[str, object]], key: str) -> float:
    values = [value for _, value in points_of(lines, key)[0]]
    return fmean(values) if values else 0.0
