"""Quality: what ESFT gains and what it forgets, against random experts, LoRA on all experts and full fine-tuning.

    python benchmarks/quality.py run [--minutes 100] [--task synopsis]     goes on where it stopped
    python benchmarks/quality.py report                                    writes benchmarks/results/quality.md

On the embedded model and its three tasks, every method gets the same records, steps and schedule, and a sweep of four
learning rates with seed 0; the best on the validation split is run with seeds 1 and 2. All of it with and without the
paper's 1:1 mix of general records. Scores are on the test split. Forgetting is the rise in bits a byte over all domains
of held-out text. Each finished run is a line of results/quality.jsonl, so the benchmark may be stopped anywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path

from rich.console import Console

import metier
from metier import embedded
from metier.config import RunConfig
from metier.data.records import load_records
from metier.evaluation.evaluate import evaluate
from metier.routing.selection import SelectionConfig, random_selection, select
from metier.training.run import train

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "quality.jsonl"
RATES = {
    "esft-token": (5e-4, 1e-3, 2e-3, 4e-3),
    "esft-gate": (5e-4, 1e-3, 2e-3, 4e-3),
    "random": (5e-4, 1e-3, 2e-3, 4e-3),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
    "full": (2.5e-4, 5e-4, 1e-3, 2e-3),
}
TOP_P = 0.5
STEPS, BATCH, MAX_LENGTH = 120, 16, 320
SEEDS = (0, 1, 2)
T_95_TWO_DEGREES = 4.303
"""Student's t for a 95% interval of three values."""


@dataclass(frozen=True)
class Run:
    """One point: a method at one learning rate with one seed."""

    task: str
    mix: bool
    method: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> tuple:
        return (self.task, self.mix, self.method, self.learning_rate, self.seed)


def done() -> dict[tuple, dict]:
    """Finished runs by key; the base of a task has the method `base`."""
    if not LINES.exists():
        return {}
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    return {(r["task"], r["mix"], r["method"], r["learning_rate"], r["seed"]): r for r in rows}


def pending(tasks: list[str]) -> Iterator[Run]:
    """What is still to run, in order: sweeps first, then further seeds of each sweep's best."""
    for task in tasks:
        for mix in (False, True):
            for method, rates in RATES.items():
                for rate in rates:
                    yield Run(task, mix, method, rate, 0)
    for task in tasks:
        for mix in (False, True):
            for method in RATES:
                best = best_rate(done(), task, mix, method)
                for seed in SEEDS[1:]:
                    yield Run(task, mix, method, best, seed)


def best_rate(rows: dict[tuple, dict], task: str, mix: bool, method: str) -> float:
    """The learning rate with the best validation score in the sweep."""
    return max(RATES[method], key=lambda rate: rows[task, mix, method, rate, 0]["validation"])


def measure(model, tokenizer, task: str) -> dict:
    """Scores on validation and test, and bits a byte of every domain."""
    validation = evaluate(model, tokenizer, task=task, split="validation", limit=100, general=False)
    test = evaluate(model, tokenizer, task=task, general=True, general_bytes=12_000, cloze_items=200)
    return {
        "validation": validation.score.value,
        "test": {name: score.value for name, score in test.metrics.items()},
        "bits_per_byte": {name: loss.bits_per_byte for name, loss in test.domains.items()},
        "cloze": test.cloze.accuracy,
    }


def selection_for(run: Run, folder: Path) -> str | None:
    """The run's selection file: by the task's scores, or as many experts drawn at random."""
    if run.method in ("full", "lora"):
        return None
    base = metier.load("embedded", dtype="float32")
    records = load_records(embedded.task_path(run.task, "train"))
    profile = metier.profile(base.model, base.tokenizer, records, num_tokens=65_536, max_length=512)
    score = "gate" if run.method == "esft-gate" else "token"
    selection = select(profile, SelectionConfig(score=score, top_p=TOP_P))
    if run.method == "random":
        selection = random_selection(selection, num_experts=profile.num_experts, seed=run.seed)
    selection.save(folder / "selection.json")
    return str(folder / "selection.json")


def execute(run: Run) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = RunConfig(
            model="embedded",
            dataset=str(embedded.task_path(run.task, "train")),
            output_dir=str(folder / "run"),
            method=run.method if run.method in ("full", "lora") else "esft",
            selection=selection_for(run, folder),
            general_dataset=str(embedded.mix_path()) if run.mix else None,
            dtype="float32",
            learning_rate=run.learning_rate,
            # with the mix a batch is twice as large: as many task records a step either way
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=2 if run.mix else 1,
            max_steps=STEPS,
            warmup_steps=6,
            max_length=MAX_LENGTH,
            seed=run.seed,
        )
        result = train(config, console=Console(file=StringIO()))
        cost = {"trained": result.plan.num_trained, "seconds": result.train_seconds}
        if result.selection is not None:
            cost["experts"] = result.selection.num_selected
        return {**asdict(run), **cost, **measure(result.model, result.tokenizer, run.task)}


def add(row: dict) -> None:
    with LINES.open("a") as file:
        file.write(json.dumps(row) + "\n")
    main_metric = next(iter(row["test"].values()))
    print(row["task"], row["method"], row["learning_rate"], row["mix"], row["seed"], round(main_metric, 2), flush=True)


def run_all(tasks: list[str], minutes: float) -> None:
    stop = time.monotonic() + 60 * minutes
    for task in tasks:
        if (task, False, "base", 0.0, 0) not in done():
            base = metier.load("embedded", dtype="float32")
            nothing = {"task": task, "mix": False, "method": "base", "learning_rate": 0.0, "seed": 0}
            add({**nothing, **measure(base.model, base.tokenizer, task)})
    for run in pending(tasks):
        if run.key in done():
            continue
        if time.monotonic() > stop:
            print("time is up; run again to go on")
            return
        add(execute(run))


def forgetting(row: dict, base: dict) -> float:
    """Rise of the mean bits a byte over domains."""
    return statistics.mean(row["bits_per_byte"][d] - base["bits_per_byte"][d] for d in base["bits_per_byte"])


def mean_and_half(values: list[float]) -> str:
    if len(values) < len(SEEDS):
        return f"{statistics.mean(values):.3f} ({len(values)} seed)"
    half = T_95_TWO_DEGREES * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def report() -> None:
    rows = done()
    lines = ["# Quality", "", "    python benchmarks/quality.py run && python benchmarks/quality.py report", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    packages = ", ".join(f"{name} {version(name)}" for name in ("metier", "torch", "transformers", "peft", "trl"))
    lines += [f"{packages}. {STEPS} steps of {BATCH} records, top_p={TOP_P}; ± is a 95% interval over seeds.", ""]
    for task in embedded.task_names():
        for mix in (False, True):
            lines += table(rows, task, mix)
    (RESULTS / "quality.md").write_text("\n".join(lines) + "\n")
    print(RESULTS / "quality.md")


def table(rows: dict[tuple, dict], task: str, mix: bool) -> list[str]:
    base = rows.get((task, False, "base", 0.0, 0))
    methods = [m for m in RATES if all((task, mix, m, rate, 0) in rows for rate in RATES[m])]
    if base is None or not methods:
        return []
    metric = next(iter(base["test"]))
    at_best = {}
    for method in methods:
        best = best_rate(rows, task, mix, method)
        at_best[method] = [rows[k] for s in SEEDS if (k := (task, mix, method, best, s)) in rows]
    full_gain = full_loss = math.nan
    if "full" in at_best:
        full_gain = statistics.mean(r["test"][metric] - base["test"][metric] for r in at_best["full"])
        full_loss = statistics.mean(forgetting(r, base) for r in at_best["full"])
    lines = [f"## {task}, {'1:1 mix of general records' if mix else 'task records alone'}", ""]
    lines += [f"Base: {metric} {base['test'][metric]:.2f}.", ""]
    lines += [
        f"| method | best rate | {metric} | of full's gain | forgetting | of full's | trained |",
        "|-|-|-|-|-|-|-|",
    ]
    for method, best_runs in at_best.items():
        scores = [r["test"][metric] for r in best_runs]
        lost = [forgetting(r, base) for r in best_runs]
        gain = statistics.mean(scores) - base["test"][metric]
        lines.append(
            f"| {method} | {best_runs[0]['learning_rate']:g} | {mean_and_half(scores)} | {gain / full_gain:.0%} "
            f"| {mean_and_half(lost)} | {statistics.mean(lost) / full_loss:.0%} | {best_runs[0]['trained']:,} |"
        )
    lines += ["", "The whole front, seed 0:", "", "| method | rate | score | forgetting |", "|-|-|-|-|"]
    for method in methods:
        for rate in RATES[method]:
            row = rows[task, mix, method, rate, 0]
            lines.append(f"| {method} | {rate:g} | {row['test'][metric]:.2f} | {forgetting(row, base):+.3f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--task", choices=embedded.task_names())
    args = parser.parse_args()
    if args.what == "run":
        run_all([args.task] if args.task else list(embedded.task_names()), args.minutes)
    report()


if __name__ == "__main__":
    main()
