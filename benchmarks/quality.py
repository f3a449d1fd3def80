"""Quality: what ESFT gains and what it forgets, against random experts, LoRA on all experts and full fine-tuning.

    python benchmarks/quality.py run [--minutes 100] [--task synopsis] [--mix no]    goes on where it stopped
    python benchmarks/quality.py report                                              writes results/quality.md, .png

On the embedded model and its three tasks, every method sees each training record once, in the same batches of 16, with
a linearly falling learning rate. Each gets a sweep of three learning rates a factor of 3 apart with seed 0; the best on
the validation split is run with seeds 1 and 2. All of it with and without the paper's 1:1 mix of general records, which
come on top of the task's in each batch. Scores are on the test split. Forgetting is the rise in bits a byte, the mean
over ten domains of held-out text. Each finished run is a line of results/quality.jsonl, so the benchmark may be stopped
anywhere; lines of another embedded model do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from io import StringIO
from pathlib import Path

from quality_report import RATES, SEEDS, Rows, best_rate, write_report
from rich.console import Console

import metier
from metier import embedded
from metier.config import RunConfig
from metier.data.records import load_records
from metier.evaluation.evaluate import evaluate
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import ExpertSelection, SelectionConfig, random_selection, select
from metier.training.run import train

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "quality.jsonl"
TASKS = ("synopsis", "translate", "sections")
TOP_P = 0.5
BATCH, MAX_LENGTH = 16, 320
WARMUP_STEPS = 5
VALIDATION_ITEMS, TEST_ITEMS, GENERAL_BYTES = 100, 300, 8_000


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


@cache
def model_sum() -> str:
    """Which embedded model a line was measured on."""
    return hashlib.sha256((embedded.model_path() / "model.safetensors").read_bytes()).hexdigest()[:16]


def done() -> Rows:
    """Finished runs of this embedded model by key; the base of a task has the method `base`."""
    if not LINES.exists():
        return {}
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    keys = ("task", "mix", "method", "learning_rate", "seed")
    return {tuple(row[key] for key in keys): row for row in rows if row["model"] == model_sum()}


def pending(tasks: list[str], mixes: list[bool]) -> Iterator[Run]:
    """Every run in order: for each mix and task the sweep, then further seeds of each method's best."""
    for mix in mixes:
        for task in tasks:
            for method, rates in RATES.items():
                for rate in rates:
                    yield Run(task, mix, method, rate, 0)
            for method in RATES:
                best = best_rate(done(), task, mix, method)
                for seed in SEEDS[1:]:
                    yield Run(task, mix, method, best, seed)


def measure(model, tokenizer, task: str) -> dict:
    """Scores on validation and test, and bits a byte of every domain."""
    validation = evaluate(model, tokenizer, task=task, split="validation", limit=VALIDATION_ITEMS, general=False)
    test = evaluate(model, tokenizer, task=task, limit=TEST_ITEMS, general_bytes=GENERAL_BYTES, cloze_items=1)
    return {
        "validation": validation.score.value,
        "test": {name: score.value for name, score in test.metrics.items()},
        "bits_per_byte": {name: loss.bits_per_byte for name, loss in test.domains.items()},
    }


@cache
def task_profile(task: str) -> RoutingProfile:
    base = metier.load("embedded", dtype="float32")
    records = load_records(embedded.task_path(task, "train"))
    return metier.profile(base.model, base.tokenizer, records, num_tokens=65_536, max_length=512)


def selection_for(run: Run) -> ExpertSelection:
    """By the task's scores, or as many experts a layer drawn at random."""
    profile = task_profile(run.task)
    score = "gate" if run.method == "esft-gate" else "token"
    selection = select(profile, SelectionConfig(score=score, top_p=TOP_P))
    if run.method == "random":
        return random_selection(selection, num_experts=profile.num_experts, seed=run.seed)
    return selection


def run_config(
    folder: Path,
    task: str,
    *,
    learning_rate: float,
    selection: ExpertSelection | None = None,
    method: str = "esft",
    mix: bool = False,
    seed: int = 0,
) -> RunConfig:
    """One pass over a task's training records; what every benchmark that trains the embedded model runs.

    Args:
        selection: the experts to train, with "esft"; saved in `folder`, as is the run.
    """
    if selection is not None:
        selection.save(folder / "selection.json")
    return RunConfig(
        model="embedded",
        dataset=str(embedded.task_path(task, "train")),
        output_dir=str(folder / "run"),
        method=method,
        selection=None if selection is None else str(folder / "selection.json"),
        general_dataset=str(embedded.mix_path()) if mix else None,
        dtype="float32",
        learning_rate=learning_rate,
        per_device_train_batch_size=BATCH,
        # with the mix a step is twice as large: as many task records a step either way
        gradient_accumulation_steps=2 if mix else 1,
        padding_free=True,
        warmup_steps=WARMUP_STEPS,
        max_length=MAX_LENGTH,
        seed=seed,
    )


def execute(run: Run) -> dict:
    with tempfile.TemporaryDirectory() as name:
        is_baseline = run.method in ("full", "lora")
        config = run_config(
            Path(name),
            run.task,
            learning_rate=run.learning_rate,
            selection=None if is_baseline else selection_for(run),
            method=run.method if is_baseline else "esft",
            mix=run.mix,
            seed=run.seed,
        )
        result = train(config, console=Console(file=StringIO()))
        cost = {"trained": result.plan.num_trained, "seconds": round(result.train_seconds, 1)}
        if result.selection is not None:
            cost["experts"] = result.selection.num_selected
        return {**asdict(run), **cost, **measure(result.model, result.tokenizer, run.task)}


def add(row: dict) -> None:
    with LINES.open("a") as file:
        file.write(json.dumps({"model": model_sum(), **row}) + "\n")
    main_metric = next(iter(row["test"].values()))
    print(row["task"], row["mix"], row["method"], row["learning_rate"], row["seed"], round(main_metric, 2), flush=True)


def run_all(tasks: list[str], mixes: list[bool], minutes: float) -> None:
    stop = time.monotonic() + 60 * minutes
    for task in tasks:
        if (task, False, "base", 0.0, 0) not in done():
            base = metier.load("embedded", dtype="float32")
            nothing = {"task": task, "mix": False, "method": "base", "learning_rate": 0.0, "seed": 0}
            add({**nothing, **measure(base.model, base.tokenizer, task)})
    for run in pending(tasks, mixes):
        if run.key in done():
            continue
        if time.monotonic() > stop:
            print("time is up; run again to go on")
            return
        add(execute(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--mix", choices=("no", "yes"), help="runs without or with general data alone")
    args = parser.parse_args()
    if args.what == "run":
        mixes = [False, True] if args.mix is None else [args.mix == "yes"]
        run_all([args.task] if args.task else list(TASKS), mixes, args.minutes)
    settings = f"batches of {BATCH} task records, top_p={TOP_P}, {TEST_ITEMS} test items"
    print(write_report(done(), TASKS, RESULTS, about=__doc__ or "", settings=settings))


if __name__ == "__main__":
    main()
