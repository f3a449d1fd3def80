"""How wrong the planner is: predicted against measured peak memory of real runs, each in a process of its own.

    python benchmarks/planner.py run [--minutes 100]     goes on where it stopped
    python benchmarks/planner.py predict                 predicts all of them again
    python benchmarks/planner.py report                  writes results/planner.md and .png

A run makes a random model of a family, wraps it and trains four steps with the trainer of `metier train` on full
batches, half of whose tokens have a loss. Measured is the most resident memory over what the process held before the
model was made; before that a tiny model of the same family is trained the same way, so that the libraries' code is
there. Predicted is what `metier plan` says, from the configuration alone. A third of the runs, chosen by a hash of
their names, is not looked at while the planner is worked on. Each finished run is a line of results/planner.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "planner.jsonl"
NUM_STEPS = 4
GOALS = {"median": 0.04, "95th percentile": 0.10, "most under-predicted": 0.03}
_MOE = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192, "hidden_size": 512}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "embedded": ("embedded", {}),
    "olmoe": (
        "olmoe",
        {**_MOE, "intermediate_size": 256, "num_hidden_layers": 6, "num_experts": 32, "num_experts_per_tok": 4},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**_MOE, "moe_intermediate_size": 192, "num_hidden_layers": 5, "num_experts": 24, "num_experts_per_tok": 2,
         "num_key_value_heads": 2, "head_dim": 64},
    ),
    "llama": (
        "llama",
        {**_MOE, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 16_384},
    ),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora_r": 8},
    "expert_lora": {"method": "expert_lora", "lora_r": 8, "select_top_k": 8},
    "esft-2": {"method": "esft", "select_top_k": 2},
    "esft-8": {"method": "esft", "select_top_k": 8},
    "meft-host": {"method": "meft", "meft_r": 2048, "meft_store": "host"},
    "meft-device": {"method": "meft", "meft_r": 2048, "meft_store": "device"},
}
SHAPES = ((1, 512), (4, 512), (2, 1024))


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    family: str
    method: str
    num_rows: int
    num_tokens: int
    checkpointing: bool

    @property
    def name(self) -> str:
        ending = "-checkpointing" if self.checkpointing else ""
        return f"{self.family}-{self.method}-{self.num_rows}x{self.num_tokens}{ending}"

    @property
    def is_held_out(self) -> bool:
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 3 == 0

    def config(self, output_dir: str = "-") -> Any:
        from metier.config import RunConfig

        return RunConfig(
            model=self.family,
            dataset="-",
            output_dir=output_dir,
            dtype="float32",
            per_device_train_batch_size=self.num_rows,
            max_length=self.num_tokens,
            gradient_checkpointing=self.checkpointing,
            max_steps=NUM_STEPS,
            **METHODS[self.method],
        )


def cells() -> Iterator[Cell]:
    for family in FAMILIES:
        for method in METHODS if family != "llama" else ("full", "lora", "meft-host", "meft-device"):
            for num_rows, num_tokens in SHAPES:
                # each shape with checkpointing for about half of the methods
                digest = hashlib.sha256(f"{family} {method} {num_rows} {num_tokens}".encode()).digest()
                yield Cell(family, method, num_rows, num_tokens, checkpointing=bool(digest[0] % 2))


def base_config(family: str) -> Any:
    from transformers import AutoConfig

    from metier.models.skeleton import model_config

    kind, sizes = FAMILIES[family]
    return model_config("embedded") if kind == "embedded" else AutoConfig.for_model(kind, **sizes)


def measure(cell: Cell) -> dict[str, Any]:
    """Train, in this process, and say what it took."""
    from metier.memory.allocator import give_back_what_is_free
    from metier.training.callbacks import peak_memory_bytes, reset_peak_memory

    base = base_config(cell.family)
    small = base_config(cell.family)
    small.num_hidden_layers = 2
    _train(Cell(cell.family, cell.method, 1, 32, cell.checkpointing), small)
    # what was freed is the system's again, so that nothing of the run is hidden in it
    give_back_what_is_free()
    reset_peak_memory()
    before = peak_memory_bytes()
    seconds = _train(cell, base)
    # the first one makes the optimizer's state
    return {"peak_bytes": peak_memory_bytes() - before, "step_seconds": median(seconds[1:])}


def _train(cell: Cell, base: Any) -> list[float]:
    """Returns the seconds of each step; nothing else is left."""
    seconds = _steps(cell, base)
    gc.collect()
    return seconds


def _steps(cell: Cell, base: Any) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    import metier
    from metier.data.encode import IGNORED, Encoded
    from metier.methods.wrap import wrap
    from metier.models.moe import is_dense, moe_layers
    from metier.routing.selection import ExpertSelection
    from metier.training.trainer import make_trainer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base, dtype=torch.float32)
    tokenizer = metier.load("embedded").tokenizer
    with tempfile.TemporaryDirectory() as folder:
        config = cell.config(folder)
        selection = None
        if config.select_top_k is not None and not is_dense(model):
            layers = moe_layers(model)
            chosen = {layer.index: tuple(range(config.select_top_k)) for layer in layers}
            selection = ExpertSelection(experts=chosen, num_experts=layers[0].num_experts)
        wrapped = wrap(model, config, selection)
        half = cell.num_tokens // 2
        ids = torch.randint(10, base.vocab_size, (cell.num_rows * NUM_STEPS, cell.num_tokens)).tolist()
        items = [Encoded(input_ids=row, labels=[IGNORED] * half + row[half:], origin="random") for row in ids]
        trainer = make_trainer(wrapped, tokenizer, items, config, Path(folder), eval_items=None, callbacks=[])
        seconds: list[float] = []
        plain = trainer.training_step

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = plain(*args, **kwargs)
            seconds.append(time.perf_counter() - started)
            return out

        trainer.training_step = timed
        trainer.train()
    return seconds


def predict(cell: Cell, estimators: dict[str, Any]) -> dict[str, Any]:
    from metier.planning.estimate import Estimator
    from metier.planning.plan import WORKSPACE_BYTES

    if cell.family not in estimators:
        estimators[cell.family] = Estimator(base_config(cell.family))
    estimate = estimators[cell.family](cell.config())
    predicted = {**estimate.device_bytes, "host": estimate.host_bytes, "workspace": WORKSPACE_BYTES}
    return {"predicted_bytes": sum(predicted.values()), "predicted": predicted}


def in_a_process(command: list[str], **variables: str) -> dict[str, Any]:
    """What a script prints as its last line, run as a user starts it: glibc as it is, but for `variables`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | variables
    child = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: {child.stderr}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def run(minutes: float) -> bool:
    """Whether the grid is complete."""
    done = {line["name"] for line in _lines()}
    until = time.monotonic() + 60 * minutes
    estimators: dict[str, Any] = {}
    # in an order of no meaning, so that a part of the grid stands for all of it
    for cell in sorted(cells(), key=lambda cell: hashlib.sha256(f"order of {cell.name}".encode()).digest()):
        if cell.name in done:
            continue
        if time.monotonic() > until:
            return False
        measured = in_a_process([__file__, "measure", json.dumps(asdict(cell))])
        line = {
            "name": cell.name,
            **asdict(cell),
            "is_held_out": cell.is_held_out,
            **measured,
            **predict(cell, estimators),
        }
        with LINES.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(cell.name, f"{line['predicted_bytes'] / line['peak_bytes'] - 1:+.1%}", flush=True)
    return True


def predict_again() -> None:
    """Put what the planner says now into every line."""
    estimators: dict[str, Any] = {}
    lines = _lines()
    for line in lines:
        line |= predict(Cell(**{name: line[name] for name in Cell.__slots__}), estimators)
    LINES.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()] if LINES.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "predict", "report", "measure"))
    parser.add_argument("cell", nargs="?")
    parser.add_argument("--minutes", type=float, default=100.0)
    given = parser.parse_args()
    if given.what == "measure":
        print(json.dumps(measure(Cell(**json.loads(given.cell)))))
    elif given.what == "run":
        sys.exit(0 if run(given.minutes) else 1)
    elif given.what == "predict":
        predict_again()
    else:
        report()


def report() -> None:
    """Write the table of all runs, the errors and the picture."""
    lines = _lines()
    parts = []
    for title, some in (
        ("All runs", lines),
        ("Used while the planner was made", [line for line in lines if not line["is_held_out"]]),
        ("Held out", [line for line in lines if line["is_held_out"]]),
    ):
        errors = sorted(abs(_error(line)) for line in some)
        lowest = min(_error(line) for line in some)
        at_95 = errors[min(len(errors) - 1, int(0.95 * len(errors)))]
        parts.append(f"| {title} | {len(some)} | {median(errors):.1%} | {at_95:.1%} | {lowest:+.1%} |")
    rows = [
        f"| {line['name']}{' (held out)' if line['is_held_out'] else ''} | {line['predicted_bytes'] / 2**20:,.0f} | "
        f"{line['peak_bytes'] / 2**20:,.0f} | {_error(line):+.1%} |"
        for line in lines
    ]
    complete = len({line["name"] for line in lines}), sum(1 for _ in cells())
    text = f"""# The planner's error

    python benchmarks/planner.py run && python benchmarks/planner.py report

{(__doc__ or "").split(chr(10) * 2, 2)[2].strip()}

{complete[0]} of {complete[1]} runs. The goals: median error at most 4%, 95th percentile at most 10%, never more than 3%
under what was measured.

| runs | number | median error | 95th percentile | most under-predicted |
|-|-|-|-|-|
{chr(10).join(parts)}

![Predicted against measured](planner.png)

| run | predicted, MiB | measured, MiB | error |
|-|-|-|-|
{chr(10).join(rows)}
"""
    (RESULTS / "planner.md").write_text(text, encoding="utf-8")
    _draw(lines)


def _error(line: dict[str, Any]) -> float:
    return float(line["predicted_bytes"] / line["peak_bytes"] - 1)


def _draw(lines: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6), layout="constrained")
    for is_held_out, marker, label in ((False, "o", "used while it was made"), (True, "s", "held out")):
        some = [line for line in lines if line["is_held_out"] == is_held_out]
        axes.scatter(
            [line["peak_bytes"] / 2**20 for line in some],
            [line["predicted_bytes"] / 2**20 for line in some],
            marker=marker,
            label=label,
            alpha=0.7,
        )
    ends = [min(line["peak_bytes"] for line in lines) / 2**20, max(line["peak_bytes"] for line in lines) / 2**20]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="measured, MiB", ylabel="predicted, MiB")
    axes.legend()
    figure.savefig(RESULTS / "planner.png", dpi=120)


if __name__ == "__main__":
    main()
