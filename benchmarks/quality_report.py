"""The report of `quality.py`: tables at each method's best rate, verdicts on the paper's claims, the whole front."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Rows = dict[tuple, dict]

RATES = {
    "esft-token": (7e-4, 2e-3, 6e-3),
    "esft-gate": (7e-4, 2e-3, 6e-3),
    "random": (7e-4, 2e-3, 6e-3),
    "lora": (2e-3, 6e-3, 2e-2),
    "full": (1.5e-4, 4.5e-4, 1.35e-3),
}
SEEDS = (0, 1, 2)
T_95_TWO_DEGREES = 4.303
"""Student's t for a 95% interval of three values."""
TITLES = {
    "esft-token": "ESFT, token",
    "esft-gate": "ESFT, gate",
    "random": "random experts",
    "lora": "LoRA, all experts",
    "full": "full",
}


def best_rate(rows: Rows, task: str, mix: bool, method: str) -> float:
    """The learning rate with the best validation score in the sweep."""
    return max(RATES[method], key=lambda rate: rows[task, mix, method, rate, 0]["validation"])


@dataclass(frozen=True)
class Cell:
    """One method on one task: its runs at the best rate, seed by seed, against the base."""

    method: str
    rate: float
    scores: list[float]
    gains: list[float]
    losses: list[float]
    """Rise of bits a byte."""
    num_trained: int

    @property
    def is_at_edge(self) -> bool:
        return self.rate in (RATES[self.method][0], RATES[self.method][-1])


def forgetting(row: dict, base: dict) -> float:
    """Rise of the mean bits a byte over domains."""
    return statistics.mean(row["bits_per_byte"][d] - base["bits_per_byte"][d] for d in base["bits_per_byte"])


def cells(rows: Rows, task: str, mix: bool) -> dict[str, Cell]:
    """The methods whose sweep is complete."""
    base = rows.get((task, False, "base", 0.0, 0))
    found: dict[str, Cell] = {}
    for method, rates in RATES.items():
        if base is None or any((task, mix, method, rate, 0) not in rows for rate in rates):
            continue
        rate, metric = best_rate(rows, task, mix, method), next(iter(base["test"]))
        runs = [rows[key] for seed in SEEDS if (key := (task, mix, method, rate, seed)) in rows]
        scores = [run["test"][metric] for run in runs]
        gains = [score - base["test"][metric] for score in scores]
        losses = [forgetting(run, base) for run in runs]
        found[method] = Cell(method, rate, scores, gains, losses, runs[0]["trained"])
    return found


def with_interval(values: list[float], digits: int, unit: str = "") -> str:
    """Mean and half a 95% interval over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}{unit}"
    if len(values) < len(SEEDS):
        return f"{mean} ({len(values)} of {len(SEEDS)} seeds)"
    return f"{mean} ± {T_95_TWO_DEGREES * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def shares(values: list[float], of: list[float]) -> list[float]:
    """Percent of full fine-tuning's, seed by seed."""
    return [100 * value / whole for value, whole in zip(values, of, strict=False)]


def table(rows: Rows, task: str, mix: bool) -> list[str]:
    found = cells(rows, task, mix)
    if not found:
        return []
    base = rows[task, False, "base", 0.0, 0]
    metric = next(iter(base["test"]))
    full = found.get("full")
    lines = [f"## {task}, {'1:1 mix of general records' if mix else 'task records alone'}", ""]
    lines += [f"Base: {metric} {base['test'][metric]:.2f}.", ""]
    lines += [
        f"| method | best rate | {metric} | % of full's gain | forgetting | % of full's | trained |",
        "|-|-|-|-|-|-|-|",
    ]
    for method, cell in found.items():
        gain = with_interval(shares(cell.gains, full.gains), 0) if full else "–"
        loss = with_interval(shares(cell.losses, full.losses), 0) if full else "–"
        lines.append(
            f"| {TITLES[method]} | {cell.rate:g}{' (edge)' if cell.is_at_edge else ''} "
            f"| {with_interval(cell.scores, 2)} | {gain} | {with_interval(cell.losses, 4)} | {loss} "
            f"| {cell.num_trained:,} |"
        )
    return [*lines, "", *verdicts(found), ""]


def verdicts(found: dict[str, Cell]) -> list[str]:
    """The paper's claims, each met or not by the means; said only of what was measured in full."""
    complete = {method: cell for method, cell in found.items() if len(cell.scores) == len(SEEDS)}
    if complete.keys() != RATES.keys():
        return ["Not measured in full yet."]
    mean = {m: (statistics.mean(c.gains), statistics.mean(c.losses)) for m, c in complete.items()}
    lines = ["| claim | ESFT, token | ESFT, gate |", "|-|-|-|"]

    def line(claim: str, *met: bool) -> str:
        return f"| {claim} | {' | '.join('yes' if one else 'no' for one in met)} |"

    esft = ("esft-token", "esft-gate")
    lines.append(line("at least 95% of full's gain", *(mean[m][0] >= 0.95 * mean["full"][0] for m in esft)))
    lines.append(line("at most half of full's forgetting", *(mean[m][1] <= 0.5 * mean["full"][1] for m in esft)))
    lines.append(line("gains more than random experts", *(mean[m][0] > mean["random"][0] for m in esft)))
    lines.append(line("forgets less than random experts", *(mean[m][1] < mean["random"][1] for m in esft)))
    return lines


def front_table(rows: Rows, task: str, mix: bool) -> list[str]:
    """Every rate of every sweep, and how much of the score an equal amount of forgetting buys."""
    base = rows.get((task, False, "base", 0.0, 0))
    points = [(m, r, rows[task, mix, m, r, 0]) for m in RATES for r in RATES[m] if (task, mix, m, r, 0) in rows]
    if base is None or not points:
        return []
    metric = next(iter(base["test"]))
    lines = [f"### Every rate: {task}, {'mixed' if mix else 'task records alone'}, seed 0", ""]
    lines += [f"| method | rate | {metric} | forgetting |", "|-|-|-|-|"]
    lines += [
        f"| {TITLES[m]} | {r:g} | {row['test'][metric]:.2f} | {forgetting(row, base):+.4f} |" for m, r, row in points
    ]
    return [*lines, ""]


def draw_front(axes: Axes, rows: Rows, task: str, mix: bool) -> None:
    base = rows.get((task, False, "base", 0.0, 0))
    axes.set_title(f"{task}{', 1:1 mix' if mix else ''}")
    if base is None:
        return
    metric = next(iter(base["test"]))
    axes.axhline(base["test"][metric], color="0.6", linewidth=1, linestyle=":")
    axes.axvline(0, color="0.6", linewidth=1, linestyle=":")
    for number, method in enumerate(RATES):
        found = [row for rate in RATES[method] if (row := rows.get((task, mix, method, rate, 0)))]
        x, y = [forgetting(row, base) for row in found], [row["test"][metric] for row in found]
        axes.plot(x, y, marker="osDv^"[number], label=TITLES[method], color=f"C{number}")
    axes.set_xscale("symlog", linthresh=0.02)
    axes.set_xlabel("forgetting, bits a byte")
    axes.set_ylabel(metric)


def write_report(rows: Rows, tasks: tuple[str, ...], folder: Path, *, about: str, settings: str) -> Path:
    """`quality.md` and `quality.png` in `folder`."""
    lines = ["# Quality", "", "    python benchmarks/quality.py run && python benchmarks/quality.py report", ""]
    lines += [about.split("\n\n", 2)[2].strip(), ""]
    packages = ", ".join(f"{name} {version(name)}" for name in ("metier", "torch", "transformers", "peft", "trl"))
    lines += [f"{packages}. {settings}; ± is half a 95% interval over seeds. 'edge': a better rate may lie beyond.", ""]
    lines += ["![Task score against forgetting](quality.png)", ""]
    for part in (table, front_table):
        for task in tasks:
            for mix in (False, True):
                lines += part(rows, task, mix)
    figure, grid = plt.subplots(2, len(tasks), figsize=(5 * len(tasks), 8), squeeze=False, layout="constrained")
    for column, task in enumerate(tasks):
        for mix in (False, True):
            draw_front(grid[int(mix)][column], rows, task, mix)
    grid[0][0].legend()
    figure.savefig(folder / "quality.png", dpi=80)
    path = folder / "quality.md"
    path.write_text("\n".join(lines) + "\n")
    return path
