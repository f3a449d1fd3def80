"""A comparison for people: a page, a picture, plain words, and the numbers as JSON beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metier import __version__
from metier.evaluation.comparison.cells import Cells
from metier.evaluation.comparison.results import Row, over_tasks, rows_of
from metier.evaluation.comparison.statistics import front
from metier.reports import units
from metier.reports.blocks import change_cell, metric_title, section, table
from metier.reports.comparison_words import peak_bytes, summary
from metier.reports.html import page
from metier.reports.markup import Child, Markup, join, tag
from metier.reports.plots import Point, scatter

AXES: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
    ("forgetting", "forgetting, bits a byte", lambda row: row.forgetting.value),
    ("host_peak_bytes", "peak memory, MiB", lambda row: _scaled(row, "peak", 2**20)),
    ("step_seconds", "seconds a step", lambda row: row.costs["step_seconds"]),
    ("delta_bytes", "delta, MiB", lambda row: _scaled(row, "delta_bytes", 2**20)),
)
"""Costs that a score is shown against: name, title, value."""
FRONT, OTHER = "#0b5cad", "#5b6470"
"""Of what no other beats both ways, and of the rest; who is tied with the best has a square."""


FRONT_SAID = "Blue: no other has both a higher mean score and a lower cost. Square: tied with the best score."


def _scaled(row: Row, name: str, unit: float) -> float | None:
    value = peak_bytes(row) if name == "peak" else row.costs[name]
    return None if value is None else value / unit


def write_comparison(cells: Cells) -> Path:
    """`comparison.json`, `comparison.png` and `comparison.html` in the comparison's folder; returns the page."""
    found = {task: rows_of(cells, task) for task in cells.config.tasks}
    found = {task: rows for task, rows in found.items() if rows}
    about = _about(cells)
    folder = cells.root
    folder.mkdir(parents=True, exist_ok=True)
    words = {task: summary(rows) for task, rows in found.items()}
    content = {
        "config": cells.config.as_dict(),
        **about,
        "rows": {task: [dataclasses.asdict(row) for row in rows] for task, rows in found.items()},
        "over_tasks": over_tasks(found),
        "summary": words,
    }
    (folder / "comparison.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if found:
        from metier.reports.comparison_picture import draw

        draw(found, AXES, folder / "comparison.png", colors=(FRONT, OTHER), key=FRONT_SAID)
    path = folder / "comparison.html"
    path.write_text(_page(cells, found, words, about), encoding="utf-8")
    return path


def _about(cells: Cells) -> dict[str, Any]:
    """How many cells are done, what failed, and on what they ran."""
    done = [cells.result(cell) for cell in cells.known()]
    results = [result for result in done if result is not None]
    failures = {str(cell): (cells.failure(cell) or "").strip().splitlines() for cell in cells.failed()}
    return {
        "metier_version": __version__,
        "num_done": len(results),
        "num_needed": cells.num_needed(),
        "failures": {name: lines[-1] if lines else "" for name, lines in failures.items()},
        "versions": _all_of(results, "versions"),
        "hardware": _all_of(results, "hardware"),
    }


def _all_of(results: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """The different values that the results have: more than one is no fair comparison of seconds."""
    found = {json.dumps(result[name], sort_keys=True) for result in results}
    return [json.loads(text) for text in sorted(found)]


def _page(cells: Cells, found: dict[str, list[Row]], words: dict[str, list[str]], about: dict[str, Any]) -> str:
    parts: list[Markup] = [_header(cells, about)]
    for task, rows in found.items():
        said = [tag("p", sentence) for sentence in words[task]]
        parts.append(section(task, *said, _rows_table(rows), _costs_table(rows), _charts(rows)))
    if about["failures"]:
        failed = [[name, reason] for name, reason in about["failures"].items()]
        parts.append(section("What failed", table(["run", "last words"], failed)))
    parts.append(_settings(cells, about))
    return page("Comparison", join(parts), version=__version__, note="Intervals are 95%, over seeds and items.")


def _header(cells: Cells, about: dict[str, Any]) -> Markup:
    config = cells.config
    factors = ", ".join(f"{factor:.2g}" for factor in config.learning_rate_factors)
    return tag(
        "header",
        tag("p", "metier", class_="wordmark"),
        tag("h1", f"{len(config.candidates)} methods on {config.model}"),
        tag(
            "p",
            f"{about['num_done']} of {about['num_needed']} runs are done. Each method may try "
            f"{len(config.learning_rate_factors)} learning rates, its own times {factors}, with the first seed; the "
            f"one with the best validation score is run with {len(config.seeds)} seeds.",
            class_="lead",
        ),
    )


def _rows_table(rows: Sequence[Row]) -> Markup:
    head: list[Child] = [
        "method", metric_title(rows[0].metric), "gain", "% of full's", "forgetting, bits a byte", "tie with the best",
        "rate", "own rate", "score at it, one seed", "seeds",
    ]  # fmt: skip
    body = [_row_cells(row) for row in rows]
    return table(head, body)


def _row_cells(row: Row) -> list[Child]:
    edge = " (edge)" if row.is_at_edge else ""
    score = units.number(row.score.value, digits=1)
    return [
        f"{row.number} {row.label}",
        join((score, tag("small", f" {row.score.low:.1f} to {row.score.high:.1f}", class_="interval"))),
        "" if row.is_base else units.signed(row.gain, digits=1),
        units.share(row.gain_share) if row.gain_share is not None else "",
        "" if row.is_base else change_cell(row.forgetting, digits=3),
        "yes" if row.is_tied_with_best else "",
        "" if row.is_base else f"{row.learning_rate:.2g}{edge}",
        "" if row.is_base else f"{row.default_rate:.2g}",
        units.number(row.default_score, digits=1) if row.default_score is not None else "",
        str(row.num_seeds),
    ]


def _costs_table(rows: Sequence[Row]) -> Markup:
    head: list[Child] = [
        "method", "trained", "delta", "peak memory", "foreseen", "a step", "foreseen", "a reply takes longer by",
        "KV cache",
    ]  # fmt: skip
    body: list[list[Child]] = []
    for row in rows:
        if row.is_base:
            continue
        costs = row.costs
        longer = "nothing" if costs["added_latency"] is None else units.share(costs["added_latency"])
        if row.latencies and row.latencies[0] < row.latencies[-1]:
            longer += f" ({units.share(row.latencies[0])} to {units.share(row.latencies[-1])})"
        body.append(
            [
                f"{row.number} {row.label}",
                units.count(costs["trained_parameters"]),
                units.size(costs["delta_bytes"]),
                units.size(peak_bytes(row)),
                units.size(costs["foreseen_peak_bytes"]),
                units.duration(costs["step_seconds"]),
                units.duration(costs["foreseen_step_seconds"]),
                f"{longer}; nothing once merged" if row.merges and costs["added_latency"] is not None else longer,
                _cache_cell(costs["added_kv_bytes"]),
            ]
        )
    said = "How much longer a reply takes is the median of the runs, with the least and the most of them."
    return join((table(head, body), tag("p", f"{_timed_on(rows)} {said}")))


def _cache_cell(num_bytes: float | None) -> str:
    """Of each sequence."""
    return "a second one, of the network beside it" if num_bytes is None else units.size(num_bytes) if num_bytes else ""


def _timed_on(rows: Sequence[Row]) -> str:
    """Whose seconds they are: those of several machines side by side would compare the machines."""
    untimed = [row.label for row in rows if not row.is_base and row.costs["step_seconds"] is None]
    said = f"Seconds are those of the runs on: {rows[0].timed_on}."
    return f"{said} Not run there: {', '.join(untimed)}." if untimed else said


def _charts(rows: Sequence[Row]) -> Markup:
    charts = []
    for _, title, value in AXES:
        known = [(row, float(cost)) for row in rows if not row.is_base and (cost := value(row)) is not None]
        if not known:
            continue
        best = set(front([(cost, row.score.value) for row, cost in known]))
        points = [
            Point(
                name=str(row.number),
                x=(cost, cost, cost),
                y=(row.score.value, row.score.low, row.score.high),
                color=FRONT if index in best else OTHER,
                is_square=row.is_tied_with_best,
            )
            for index, (row, cost) in enumerate(known)
        ]
        charts.append(
            scatter(points, x_title=title, y_title=metric_title(rows[0].metric), label=f"Score against {title}.")
        )
    note = f"{FRONT_SAID} Numbers: the tables'."
    return join((tag("div", *charts, class_="pair"), tag("p", note)))


def _settings(cells: Cells, about: dict[str, Any]) -> Markup:
    config = cells.config
    body: list[list[Child]] = [
        ["model", config.model],
        ["keys of every run", json.dumps(dict(config.run))],
    ]
    body += [[f"keys of {one.label}", json.dumps({"method": one.method, **one.run})] for one in config.candidates]
    body += [["versions", json.dumps(one)] for one in about["versions"]]
    body += [["hardware", json.dumps(one)] for one in about["hardware"]]
    return section("What was run", table(["", ""], body))
