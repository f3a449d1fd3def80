"""The rows of a comparison: what each candidate gained, lost and cost, at its usual learning rate and at its best."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from metier.evaluation.comparison.cells import Cell, Cells
from metier.evaluation.comparison.config import BASE, Candidate
from metier.evaluation.comparison.statistics import Seeds, differs, differs_from_one, interval, score_of
from metier.evaluation.result import Change

COSTS = (
    "trained_parameters", "delta_bytes", "device_peak_bytes", "host_peak_bytes", "step_seconds", "added_latency",
    "added_kv_bytes", "foreseen_peak_bytes", "foreseen_step_seconds",
)  # fmt: skip

_SECONDS = ("step_seconds", "foreseen_step_seconds")
"""Costs that are a machine's as much as a method's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One candidate on one task."""

    task: str
    number: int
    """In tables and pictures, the same for all tasks; 0 is the base."""
    label: str
    method: str | None
    metric: str
    num_seeds: int
    score: Change
    gain: float
    """Over the untouched base, in the metric's points."""
    gain_share: float | None
    """Of full fine-tuning's gain."""
    forgetting: Change
    """Bits a byte that general text costs more than the base, the mean over domains."""
    learning_rate: float
    is_at_edge: bool
    """Whether a better rate may lie beyond those that were tried."""
    default_rate: float
    default_score: float | None
    """At the candidate's own rate, with the first seed."""
    is_tied_with_best: bool
    merges: bool
    costs: dict[str, float | None]
    """Medians over the runs; seconds are those of one machine, None where the method has no run on it."""
    timed_on: str
    latencies: tuple[float, ...] = ()
    """By what share a reply took longer, of every run of the candidate on the task, from the least."""

    @property
    def is_base(self) -> bool:
        return self.label == BASE


def rows_of(cells: Cells, task: str) -> list[Row]:
    """The rows of a task, the base first; candidates that have no result yet are left out."""
    base = cells.result(Cell(task=task, label=BASE))
    if base is None:
        return []
    found: list[tuple[Candidate | None, list[dict[str, Any]], float, float | None]] = [(None, [base], 0.0, None)]
    for candidate in cells.config.candidates:
        best = cells.best_rate(task, candidate)
        if best is None:
            continue
        runs = [_result(cells, task, candidate, best, seed) for seed in cells.config.seeds]
        default = _result(cells, task, candidate, candidate.learning_rate, cells.config.seeds[0])
        there = [run for run in runs if run is not None]
        if there:
            found.append((candidate, there, best, None if default is None else default["test"]["score"]))
    machine = timed_on([runs for _, runs, *_ in found])
    seeds = [_seeds(runs) for _, runs, *_ in found]
    leading = max(range(len(found)), key=lambda index: seeds[index].mean)
    # the base has no seeds to differ by
    if leading == 0:
        apart = [False, *(differs_from_one(one, seeds[0]) for one in seeds[1:])]
    else:
        apart = [differs_from_one(seeds[leading], seeds[0]), *(differs(seeds[leading], one) for one in seeds[1:])]
    rows = [
        _row(cells, task, candidate, runs, rate, default, base, seeds[index], not apart[index], machine)
        for index, (candidate, runs, rate, default) in enumerate(found)
    ]
    full = next((row for row in rows if row.method == "full"), None)
    if full is None or full.gain <= 0 or not differs_from_one(seeds[rows.index(full)], seeds[0]):
        # a share of what may be nothing says nothing
        return rows
    return [dataclasses.replace(row, gain_share=None if row.is_base else row.gain / full.gain) for row in rows]


def _result(cells: Cells, task: str, candidate: Candidate, rate: float, seed: int) -> dict[str, Any] | None:
    return cells.result(Cell(task=task, label=candidate.label, learning_rate=rate, seed=seed))


def _row(
    cells: Cells,
    task: str,
    candidate: Candidate | None,
    runs: Sequence[dict[str, Any]],
    rate: float,
    default_score: float | None,
    base: dict[str, Any],
    seeds: Seeds,
    is_tied: bool,
    machine: str,
) -> Row:
    rates = [] if candidate is None else cells.rates(candidate)
    latencies = () if candidate is None else _latencies(cells, task, candidate)
    return Row(
        task=task,
        number=0 if candidate is None else 1 + cells.config.candidates.index(candidate),
        label=BASE if candidate is None else candidate.label,
        method=None if candidate is None else candidate.method,
        metric=base["test"]["metric"],
        num_seeds=len(runs),
        score=score_of(seeds),
        gain=seeds.mean - base["test"]["score"],
        gain_share=None,
        forgetting=_forgetting(runs, base),
        learning_rate=rate,
        is_at_edge=len(rates) > 1 and rate in (min(rates), max(rates)),
        default_rate=0.0 if candidate is None else candidate.learning_rate,
        default_score=default_score,
        is_tied_with_best=is_tied,
        merges=candidate is not None and bool(runs[0].get("merges")),
        costs={name: _cost(name, runs, machine) for name in COSTS} | {"added_latency": _middle(latencies)},
        timed_on=machine,
        latencies=latencies,
    )


def _latencies(cells: Cells, task: str, candidate: Candidate) -> tuple[float, ...]:
    """Of all its runs: what it costs to answer does not depend on a rate or a seed."""
    runs = [
        _result(cells, task, candidate, rate, seed) for rate in cells.rates(candidate) for seed in cells.config.seeds
    ]
    found = [None if run is None else run.get("added_latency") for run in runs]
    return tuple(sorted(one for one in found if one is not None))


def machine_of(run: dict[str, Any]) -> str:
    """The processor, its threads and the accelerator that a run had, in words."""
    found = run["hardware"]
    threads = f"{found['threads']} threads" if "threads" in found else None
    return ", ".join(part for part in (found.get("accelerator"), found.get("cpu"), threads) if part)


def timed_on(runs_by_row: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The machine on which the most rows have a run: seconds of one are compared, those of others left out."""
    rows = Counter(machine for runs in runs_by_row for machine in {machine_of(run) for run in runs})
    return min(rows, key=lambda machine: (-rows[machine], machine))


def _cost(name: str, runs: Sequence[dict[str, Any]], machine: str) -> float | None:
    return _middle([run.get(name) for run in runs if name not in _SECONDS or machine_of(run) == machine])


def _seeds(runs: Sequence[dict[str, Any]]) -> Seeds:
    return Seeds(
        tuple(run["test"]["score"] for run in runs), np.array([run["test"]["item_scores"] for run in runs], dtype=float)
    )


def _forgetting(runs: Sequence[dict[str, Any]], base: dict[str, Any]) -> Change:
    """The mean over domains; domains are resampled, as are seeds."""
    before = base["bits_per_byte"]
    rises_SD = np.array([[run["bits_per_byte"][name] - bits for name, bits in before.items()] for run in runs])
    value = float(rises_SD.mean())
    return interval(Seeds(tuple(rises_SD.mean(1)), rises_SD).resampled(), value)


def _middle(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return median(there) if there else None


def over_tasks(rows_by_task: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """Of each candidate that every task has: its mean share of full fine-tuning's gain, forgetting and costs."""
    labels = [row.label for row in next(iter(rows_by_task.values()), [])]
    found = []
    for label in labels:
        rows = [row for rows in rows_by_task.values() for row in rows if row.label == label]
        shares = [row.gain_share for row in rows if row.gain_share is not None]
        if len(rows) != len(rows_by_task) or label == BASE:
            continue
        found.append(
            {
                "label": label,
                "gain_share": fmean(shares) if len(shares) == len(rows) else None,
                "gain": fmean(row.gain for row in rows),
                "forgetting": fmean(row.forgetting.value for row in rows),
                "num_ties_with_best": sum(row.is_tied_with_best for row in rows),
                **{name: _mean([row.costs[name] for row in rows]) for name in COSTS},
            }
        )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if len(there) == len(values) and there else None
