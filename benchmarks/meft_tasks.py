"""MEFT's evaluation as its paper did it: four tasks, SmolLM2-135M-Instruct, adapters of equal memory and of equal size.

    python benchmarks/meft_tasks.py run [--task squad] [--minutes 100]     goes on where it stopped
    python benchmarks/meft_tasks.py report                                 writes results/meft_tasks.md

Sides are the base, LoRA on all linear layers, a dense Parallel Adapter with as much memory on the accelerator as MEFT,
one with as many rows, and MEFT with 1,024 rows a layer, about a quarter of the base's parameters, as the paper's 6,144
are of LLaMA-7B's. A Parallel Adapter is `method: meft` with one Key-Expert, all of whose rows fire, and no gate; MEFT
has its routers beside as many rows, 6% more numbers.

Each side trains once over the same records (few but for squad, for a run takes minutes on two cores) in the same
batches of 16, at two learning rates; that with the lower loss on validation records counts, and for MEFT and the side
that is nearest to it there are three seeds. Test items are the first of a fixed shuffle and are answered greedily. Each
finished run is a line of results/meft_tasks.jsonl, so the benchmark may be stopped anywhere. Needs `../shared/data` and
SmolLM2 (see `smollm2.py`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import smollm2
import torch
from meft_tasks_data import SCORES, TASKS, Split, load_split
from meft_tasks_report import Lines, best_rate, nearest, write_report
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import metier
from metier.config import RunConfig
from metier.data.encode import IGNORED, encode_records
from metier.data.records import load_records
from metier.evaluation.generate import encode_prompts, generate_replies
from metier.evaluation.likelihood import ScoredSequence, negative_log_likelihoods
from metier.training.run import train

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "meft_tasks.jsonl"
BATCH, MAX_LENGTH, WARMUP_STEPS = 16, 512, 5
HIDDEN_SIZE, NUM_LAYERS = 576, 30
ROWS = 1024
EQUAL_MEMORY_ROWS = 544
"""Of the Parallel Adapter that takes as much memory on the accelerator as MEFT: see `accelerator_bytes` of lines."""
LORA_RANK = 62
"""As many parameters as that Parallel Adapter, to 1%."""
DENSE = {"method": "meft", "meft_num_key_experts": 1, "meft_gate": "none"}
SIDES: dict[str, dict[str, object]] = {
    "lora": {"method": "lora", "lora_r": LORA_RANK, "lora_alpha": 2.0 * LORA_RANK},
    "pa-memory": {**DENSE, "meft_r": EQUAL_MEMORY_ROWS, "meft_top_k": EQUAL_MEMORY_ROWS},
    "pa-size": {**DENSE, "meft_r": ROWS, "meft_top_k": ROWS},
    "meft": {"method": "meft", "meft_r": ROWS},
}
RATES = {"lora": (3e-4, 1e-3), "pa-memory": (3e-4, 1e-3), "pa-size": (3e-4, 1e-3), "meft": (3e-4, 1e-3)}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One line: a side on a task at one learning rate with one seed."""

    task: str
    side: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> tuple:
        return (self.task, self.side, self.learning_rate, self.seed)


def done() -> Lines:
    if not LINES.exists():
        return {}
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    return {(row["task"], row["side"], row["learning_rate"], row["seed"]): row for row in rows}


def pending(tasks: list[str]) -> Iterator[Run]:
    """For each task the base, every side at both rates, then further seeds of MEFT and of the side nearest to it."""
    for task in tasks:
        yield Run(task, "base", 0.0, 0)
        for side, rates in RATES.items():
            for rate in rates:
                yield Run(task, side, rate, 0)
        for side in ("meft", nearest(done(), task, RATES)):
            for seed in SEEDS[1:]:
                yield Run(task, side, best_rate(done(), task, side, RATES), seed)


def accelerator_bytes(side: str, folder: Path, num_trained: int) -> int:
    """What trained numbers take of an accelerator, without activations: each with its gradient and AdamW's two moments.

    Of MEFT's rows those of the Key-Experts that a step uses, and their gradients; their moments stay with the store.
    """
    if side != "meft":
        return 16 * num_trained
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    used = max(1 - row["key_experts_unused"] for row in logged if "key_experts_unused" in row)
    in_rows = 2 * ROWS * HIDDEN_SIZE * NUM_LAYERS
    return round(8 * used * in_rows) + 16 * (num_trained - in_rows)


def execute(run: Run) -> dict:
    split = load_split(run.task)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, records in split.records().items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if run.side == "base":
            base = metier.load(smollm2.as_safetensors(), dtype="float32")
            return {**asdict(run), **measure(base.model, base.tokenizer, folder, split)}
        config = RunConfig(
            model=str(smollm2.as_safetensors()),
            dataset=str(folder / "train.jsonl"),
            output_dir=str(folder / "run"),
            dtype="float32",
            learning_rate=run.learning_rate,
            per_device_train_batch_size=BATCH,
            padding_free=True,
            warmup_steps=WARMUP_STEPS,
            max_length=MAX_LENGTH,
            seed=run.seed,
            logging_steps=1,
            **SIDES[run.side],
        )
        result = train(config, console=Console(file=StringIO()))
        cost = {
            "trained": result.plan.num_trained,
            "accelerator_bytes": accelerator_bytes(run.side, result.folder, result.plan.num_trained),
            "seconds": round(result.train_seconds, 1),
        }
        model = result.model.eval()
        return {**asdict(run), **cost, **measure(model, result.tokenizer, folder, split)}


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, split: Split) -> dict:
    """Loss on the validation records' replies, nats a token, and every test item's scores."""
    encoded = encode_records(load_records(folder / "validation.jsonl"), tokenizer, max_length=MAX_LENGTH)
    sequences, num_tokens = [], 0
    for item in encoded.items:
        start = next(position for position, label in enumerate(item.labels) if label != IGNORED)
        sequences.append(ScoredSequence(token_ids=tuple(item.input_ids), start=start))
        num_tokens += len(item.input_ids) - start
    loss = sum(negative_log_likelihoods(model, sequences)) / num_tokens
    prompts = encode_prompts(
        load_records(folder / "test.jsonl"), tokenizer, max_new_tokens=split.max_new_tokens, max_length=None
    )
    replies = generate_replies(model, tokenizer, prompts, max_new_tokens=split.max_new_tokens, batch_size=128)
    scores = {
        name: [round(score(reply.text, golds), 3) for reply, golds in zip(replies, split.golds, strict=True)]
        for name, score in SCORES[split.task].items()
    }
    return {"validation_loss": loss, "cut": sum(reply.is_cut for reply in replies), "scores": scores}


def run_all(tasks: list[str], minutes: float) -> None:
    stop = time.monotonic() + 60 * minutes
    for run in pending(tasks):
        if run.key in done():
            continue
        if time.monotonic() > stop:
            print("time is up; run again to go on")
            return
        row = execute(run)
        with LINES.open("a") as file:
            file.write(json.dumps(row) + "\n")
        means = {name: round(100 * sum(items) / len(items), 1) for name, items in row["scores"].items()}
        print(*run.key, round(row["validation_loss"], 3), means, f"{row.get('seconds', 0):.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--minutes", type=float, default=1e9)
    args = parser.parse_args()
    if args.what == "run":
        run_all([args.task] if args.task else list(TASKS), args.minutes)
    print(write_report(done(), RATES, RESULTS / "meft_tasks.md", about=__doc__ or ""))


if __name__ == "__main__":
    main()
