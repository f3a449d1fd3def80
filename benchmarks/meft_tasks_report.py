"""The report of `meft_tasks.py`: each side at its better learning rate, with intervals, and MEFT against each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from meft_tasks_data import NUM_TEST, NUM_TRAIN, SCORES, TASKS

from metier.evaluation.bootstrap import mean_interval

Lines = dict[tuple, dict]
Rates = Mapping[str, Sequence[float]]
TITLES = {
    "base": "base",
    "lora": "LoRA",
    "pa-memory": "Parallel Adapter, equal memory",
    "pa-size": "Parallel Adapter, equal rows",
    "meft": "MEFT",
}


def best_rate(lines: Lines, task: str, side: str, rates: Rates) -> float:
    """The learning rate whose run has the lowest validation loss."""
    return min(rates[side], key=lambda rate: lines[task, side, rate, 0]["validation_loss"])


def nearest(lines: Lines, task: str, rates: Rates) -> str:
    """The side whose first score is nearest to MEFT's, each at its better rate."""
    score = {side: _mean(_items(lines[task, side, best_rate(lines, task, side, rates), 0], task)) for side in rates}
    return min((side for side in rates if side != "meft"), key=lambda side: abs(score[side] - score["meft"]))


def _items(line: dict, task: str, name: str | None = None) -> list[float]:
    return [100 * item for item in line["scores"][name or next(iter(SCORES[task]))]]


def _mean(items: Sequence[float]) -> float:
    return statistics.mean(items)


def _with_interval(items: Sequence[float]) -> str:
    low, high = mean_interval(items, seed=0)
    return f"{_mean(items):.1f} ({low:.1f} to {high:.1f})"


def _over_seeds(runs: Sequence[dict], task: str, name: str) -> list[float]:
    """Every item's mean over seeds."""
    return [_mean(scores) for scores in zip(*(_items(run, task, name) for run in runs), strict=True)]


def table(lines: Lines, task: str, rates: Rates) -> list[str]:
    """One task; only sides both of whose rates are in."""
    base = lines.get((task, "base", 0.0, 0))
    complete = [side for side in rates if all((task, side, rate, 0) in lines for rate in rates[side])]
    if base is None or not complete:
        return []
    names = list(SCORES[task])
    text = [f"## {task}: trained on {NUM_TRAIN[task]:,} records, {len(base['scores'][names[0]])} test items", ""]
    text += [f"| side | rate | seeds | validation loss | {' | '.join(names)} | trained | on the accelerator |"]
    text += ["|-|-|-|-" + "|-" * len(names) + "|-|-|"]
    scores = " | ".join(_with_interval(_items(base, task, name)) for name in names)
    text += [f"| base | – | – | {base['validation_loss']:.3f} | {scores} | – | – |"]
    first: dict[str, list[float]] = {}
    for side in complete:
        rate = best_rate(lines, task, side, rates)
        runs = [line for (t, s, r, _), line in lines.items() if (t, s, r) == (task, side, rate)]
        over = {name: _over_seeds(runs, task, name) for name in names}
        first[side] = over[names[0]]
        loss = _mean([run["validation_loss"] for run in runs])
        text.append(
            f"| {TITLES[side]} | {rate:g} | {len(runs)} | {loss:.3f} "
            f"| {' | '.join(_with_interval(over[name]) for name in names)} | {runs[0]['trained'] / 1e6:.1f} M "
            f"| {runs[0]['accelerator_bytes'] / 1e6:.0f} MB |"
        )
    text.append("")
    if "meft" in first:
        for side in (side for side in first if side != "meft"):
            differences = [a - b for a, b in zip(first["meft"], first[side], strict=True)]
            text.append(f"- MEFT minus {TITLES[side]}: {_with_interval(differences)} {names[0]}")
        text.append("")
    text += ["Every run:", "", f"| side | rate | seed | validation loss | {' | '.join(names)} |"]
    text += ["|-|-|-|-" + "|-" * len(names) + "|"]
    for (t, side, rate, seed), line in lines.items():
        if t == task and side != "base":
            scores = " | ".join(f"{_mean(_items(line, task, name)):.1f}" for name in names)
            text.append(f"| {TITLES[side]} | {rate:g} | {seed} | {line['validation_loss']:.3f} | {scores} |")
    return [*text, ""]


def write_report(lines: Lines, rates: Rates, path: Path, *, about: str) -> Path:
    """`meft_tasks.md`, with what is measured so far."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("metier", "torch", "transformers", "peft", "trl"))
    text = [
        "# MEFT on four tasks",
        "",
        "    python benchmarks/meft_tasks.py run && python benchmarks/meft_tasks.py report",
    ]
    text += ["", about.split("\n\n", 2)[2].strip(), ""]
    text += [
        f"{packages}. In brackets 95% intervals over test items (bootstrap; of differences, paired). At most "
        f"{max(NUM_TEST.values()):,} test items.",
        "",
    ]
    for task in TASKS:
        text += table(lines, task, rates)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path
