"""Steps on a CPU whose output layer sees labelled positions alone, against TRL's loss.

    python benchmarks/labelled_positions.py

ESFT on the embedded model and its tasks, batches of 16 records without padding, float32: loss and backward pass,
without the optimizer's step. Each task has its share of tokens with a label. Both losses take the same batch in turn,
another batch each round, after one round to warm up, and have to be equal. Once as a process starts by default, and
once where glibc keeps its memory, so that pages are not faulted in again. Writes results/labelled_positions.md.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from trl import SFTTrainer

import metier
from metier import embedded
from metier.config import RunConfig
from metier.data.encode import encode_records
from metier.data.records import load_records
from metier.routing.selection import ExpertSelection
from metier.training.trainer import make_trainer

RESULTS = Path(__file__).parent / "results"
TASKS = ("synopsis", "translate", "sections")
BATCH, MAX_LENGTH, ROUNDS, EXPERTS = 16, 320, 7, 10


KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
WAYS = {"glibc as it is": {}, "glibc keeping its memory": KEEPING}


def row_of(task: str, folder: Path) -> str:
    base = metier.load("embedded", dtype="float32")
    items = encode_records(load_records(embedded.task_path(task, "train")), base.tokenizer, max_length=MAX_LENGTH).items
    labelled = sum(item.num_trained_tokens for item in items) / sum(item.num_tokens for item in items)
    selection = ExpertSelection(experts={layer.index: tuple(range(EXPERTS)) for layer in metier.moe_layers(base.model)})
    model = peft.get_peft_model(base.model, metier.EsftConfig.from_selection(selection)).train()
    config = RunConfig(
        model="embedded", dataset=task, output_dir=str(folder), per_device_train_batch_size=BATCH, padding_free=True
    )
    trainer = make_trainer(model, base.tokenizer, items, config, folder, eval_items=None, callbacks=[])
    sides = {
        "TRL": lambda batch: SFTTrainer.compute_loss(trainer, model, batch),
        "ours": lambda batch: trainer.compute_loss(model, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        batch = trainer.data_collator(items[number * BATCH : (number + 1) * BATCH])
        batch.pop("origin", None)
        losses = []
        for name, loss_of in sides.items():
            started = time.perf_counter()
            loss = loss_of(dict(batch))
            loss.backward()
            if number:
                times[name].append(time.perf_counter() - started)
            losses.append(loss.detach())
            model.zero_grad()
        torch.testing.assert_close(*losses)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spreads = [f"{medians[name]:.2f} s ({min(values):.2f} to {max(values):.2f})" for name, values in times.items()]
    return f"| {task} | {labelled:.0%} | {' | '.join(spreads)} | {medians['ours'] / medians['TRL']:.2f} |"


def rows_of_a_process(environment: dict[str, str]) -> list[str]:
    """Every task's row; glibc reads its settings when a process starts."""
    command = [sys.executable, __file__, "rows"]
    plain = {name: value for name, value in os.environ.items() if name not in KEEPING}
    done = subprocess.run(command, env={**plain, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.startswith("|")]


def main() -> None:
    if sys.argv[1:] == ["rows"]:
        for task in TASKS:
            with tempfile.TemporaryDirectory() as folder:
                print(row_of(task, Path(folder)), flush=True)
        return
    lines = ["# The loss on labelled positions", "", "    python benchmarks/labelled_positions.py", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    lines += [f"{packages}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}."]
    for way, environment in WAYS.items():
        lines += ["", f"## {way}", ""]
        lines += ["| task | tokens with a label | TRL | labelled positions alone | of TRL's |", "|-|-|-|-|-|"]
        lines += rows_of_a_process(environment)
    (RESULTS / "labelled_positions.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
