"""How wrong the planner is: memory and seconds of real runs, predicted and measured, each in a process of its own.

    python benchmarks/planner.py run [--minutes 100]     goes on where it stopped
    python benchmarks/planner.py tensors                 counts tensor bytes of all of them, two at once
    python benchmarks/planner.py predict                 predicts all of them again, on the machine that ran them
    python benchmarks/planner.py predict --only-memory   on any machine; seconds stay as they are
    python benchmarks/planner.py tune                    what its constants would best be
    python benchmarks/planner.py report                  writes results/planner.md and .png

A run makes a random model of a family, wraps it and trains six steps with the trainer of `metier train` on full
batches, half of whose tokens have a loss. Measured is the most resident memory over what the process held before the
model was made; before that a tiny model of the same family is trained the same way, so that the libraries' code is
there. A step's time is the median of the last five, the optimizer's part included. Predicted is what `metier plan`
says, from the configuration alone. Tensor bytes are those of two more steps of the same run, in which every storage
that is made and freed is counted; what is predicted of them leaves out the process's own. A third of the runs, chosen
by a hash of their names, is not looked at while the planner is worked on. Each finished run is a line of
results/planner.jsonl.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "planner.jsonl"
NUM_STEPS, NUM_COUNTED_STEPS = 6, 2
MEMORY, TIME = ("predicted_bytes", "peak_bytes"), ("predicted_seconds", "step_seconds")
TENSORS = ("predicted_tensor_bytes", "tensor_bytes")
"""Names of what was predicted and what was measured."""
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
    "prefix": {"method": "prefix_attention"},
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
        for method in METHODS if family != "llama" else ("full", "lora", "prefix", "meft-host", "meft-device"):
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
    from metier.planning.operation_times import reference
    from metier.training.callbacks import peak_memory_bytes, reset_peak_memory

    base = base_config(cell.family)
    small = base_config(cell.family)
    small.num_hidden_layers = 2
    _train(Cell(cell.family, cell.method, 1, 32, cell.checkpointing), small)
    paces = [reference()[0]]
    # what was freed is the system's again, so that nothing of the run is hidden in it
    give_back_what_is_free()
    reset_peak_memory()
    before = peak_memory_bytes()
    seconds = _train(cell, base)
    peak = peak_memory_bytes() - before
    paces.append(reference()[0])
    # the first one makes the optimizer's state
    return {"peak_bytes": peak, "step_seconds": median(seconds[1:]), "reference_seconds": paces}


def _train(cell: Cell, base: Any) -> list[float]:
    """Returns the seconds of each step; nothing else is left."""
    seconds, _ = _steps(cell, base)
    gc.collect()
    return seconds


def count_tensors(cell: Cell) -> dict[str, int]:
    """Train, in this process, and count the bytes of tensors: none of the process's own."""
    return {"tensor_bytes": _steps(cell, base_config(cell.family), is_counted=True)[1]}


def _steps(cell: Cell, base: Any, *, is_counted: bool = False) -> tuple[list[float], int]:
    """Seconds of each step, and the most tensor bytes where they are counted, which takes some times as long."""
    import torch
    from transformers import AutoModelForCausalLM

    import metier
    from metier.data.encode import IGNORED, Encoded
    from metier.memory.step_gradients import step_gradients_of
    from metier.methods.meft import MeftLayer
    from metier.methods.wrap import wrap
    from metier.models.moe import is_dense, moe_layers
    from metier.planning.step import columns_that_are_written
    from metier.planning.trace import Tracer
    from metier.routing.selection import ExpertSelection
    from metier.training.callbacks import StepTimes
    from metier.training.trainer import make_trainer

    tracer = Tracer(None) if is_counted else None
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
        times = StepTimes()
        trainer = make_trainer(wrapped, tokenizer, items, config, Path(folder), eval_items=None, callbacks=[times])
        if tracer is None:
            trainer.train()
            return times.seconds, 0
        trainer.args.max_steps = NUM_COUNTED_STEPS
        rows = [s.rows_NMWD for m in wrapped.modules() if isinstance(m, MeftLayer) for s in m.stores.values()]
        of_rows = [found for p in wrapped.parameters() if (found := step_gradients_of(p)) is not None]
        room = [one.reserve(torch.device("cpu")) for one in of_rows]
        there = (*wrapped.parameters(), *wrapped.buffers(), *rows, *room)
        for tensor in there:
            tracer.memory.known(tensor)
        storages = {s.data_ptr(): s.nbytes() for tensor in there if (s := tensor.untyped_storage()).nbytes()}
        with tracer, columns_that_are_written(model):
            trainer.train()
        return times.seconds, sum(storages.values()) + tracer.memory.peak


def predict(cell: Cell, estimators: dict[str, Any], *, only_memory: bool = False) -> dict[str, Any]:
    from metier.planning.budget import WORKSPACE_BYTES
    from metier.planning.clock import clock_here
    from metier.planning.estimate import HOLES, Estimator
    from metier.planning.step_time import step_time

    if cell.family not in estimators:
        estimators[cell.family] = Estimator(base_config(cell.family))
    estimate = estimators[cell.family](cell.config())
    predicted = {**estimate.device_bytes, "host": estimate.host_bytes, "workspace": WORKSPACE_BYTES}
    holes = estimate.device_bytes["temporaries"] * (1 - 1 / (1 + HOLES)) if cell.checkpointing else 0
    of_memory = {
        "predicted_bytes": sum(predicted.values()),
        "predicted_tensor_bytes": round(sum(predicted.values()) - WORKSPACE_BYTES - holes),
        "predicted": predicted,
    }
    if only_memory:
        return of_memory
    from metier.config import RunConfig

    clock = clock_here(RunConfig(model="-", dataset="-", output_dir=str(Path.cwd())))
    timed = step_time(estimate, clock)
    clock.save()
    return {
        **of_memory,
        "predicted_seconds": timed.seconds,
        "operation_seconds": timed.operation_seconds,
        "in_a_step": timed.in_a_step,
        "seconds_by_part": timed.parts,
    }


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
        errors = line["predicted_bytes"] / line["peak_bytes"] - 1, line["predicted_seconds"] / line["step_seconds"] - 1
        print(cell.name, f"memory {errors[0]:+.1%}, time {errors[1]:+.1%}", flush=True)
    return True


def tensors() -> None:
    """Count the tensor bytes of all runs for which that was not done; two processes at once take no more memory."""
    lines = _lines()
    wanted = [line for line in lines if "tensor_bytes" not in line]

    def counted(line: dict[str, Any]) -> dict[str, Any]:
        cell = {name: line[name] for name in Cell.__slots__}
        return in_a_process([__file__, "count", json.dumps(cell)], OMP_NUM_THREADS="1")

    with ThreadPoolExecutor(2) as pool:
        for line, found in zip(wanted, pool.map(counted, wanted), strict=True):
            line |= found
            LINES.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            print(line["name"], f"{found['tensor_bytes'] / 2**20:.0f} MiB", flush=True)


def predict_again(*, only_memory: bool) -> None:
    """Put what the planner says now into every line."""
    estimators: dict[str, Any] = {}
    lines = _lines()
    for line in lines:
        line |= predict(Cell(**{name: line[name] for name in Cell.__slots__}), estimators, only_memory=only_memory)
    LINES.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()] if LINES.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "tensors", "predict", "tune", "report", "measure", "count"))
    parser.add_argument("cell", nargs="?")
    parser.add_argument("--only-memory", action="store_true")
    parser.add_argument("--minutes", type=float, default=100.0)
    given = parser.parse_args()
    if given.what == "measure":
        print(json.dumps(measure(Cell(**json.loads(given.cell)))))
    elif given.what == "count":
        print(json.dumps(count_tensors(Cell(**json.loads(given.cell)))))
    elif given.what == "tensors":
        tensors()
    elif given.what == "run":
        sys.exit(0 if run(given.minutes) else 1)
    elif given.what == "predict":
        predict_again(only_memory=given.only_memory)
    elif given.what == "tune":
        tuned()
    else:
        report()


def report() -> None:
    """Write the table of all runs, the errors and the pictures."""
    lines = _lines()
    groups = (
        ("All runs", lines),
        ("Used while the planner was made", [line for line in lines if not line["is_held_out"]]),
        ("Held out", [line for line in lines if line["is_held_out"]]),
    )
    rows = [
        f"| {line['name']}{' (held out)' if line['is_held_out'] else ''} | {line['predicted_bytes'] / 2**20:,.0f} | "
        f"{line['peak_bytes'] / 2**20:,.0f} | {_error(line, MEMORY):+.1%} | "
        f"{_of_tensors(line)} | {line['predicted_seconds']:.2f} | "
        f"{line['step_seconds']:.2f} | {_error(line, TIME):+.1%} |"
        for line in sorted(lines, key=lambda line: line["name"])
    ]
    paces = [1e3 * pace for line in lines for pace in line["reference_seconds"]]
    text = f"""# The planner's error

    python benchmarks/planner.py run && python benchmarks/planner.py tensors
    python benchmarks/planner.py predict && python benchmarks/planner.py report

{(__doc__ or "").split(chr(10) * 2, 2)[2].strip()}

{len(lines)} of {sum(1 for _ in cells())} runs. The goals: of memory a median error of at most 4%, a 95th percentile
of at most 10%, and never more than 3% under what was measured; of a step's time a median error of at most 15%.
Others use this machine too: one product, timed before and after each run, took {min(paces):.1f} to {max(paces):.1f} ms,
the median {median(paces):.1f}.

| memory | number | median error | 95th percentile | most under-predicted | over 3% under |
|-|-|-|-|-|-|
{chr(10).join(_summary(title, some, MEMORY) for title, some in groups)}

| tensor bytes | number | median error | 95th percentile | most under-predicted | over 3% under |
|-|-|-|-|-|-|
{chr(10).join(_summary(title, some, TENSORS) for title, some in groups)}

| a step's time | number | median error | 95th percentile | most under-predicted |
|-|-|-|-|-|
{chr(10).join(_summary(title, some, TIME) for title, some in groups)}

| a step's time by family | number | median error | 95th percentile | most under-predicted |
|-|-|-|-|-|
{chr(10).join(_summary(family, [line for line in lines if line["family"] == family], TIME) for family in FAMILIES)}

![Predicted against measured](planner.png)

| run | MiB predicted | measured | error | of tensors | error | seconds predicted | measured | error |
|-|-|-|-|-|-|-|-|-|
{chr(10).join(rows)}
"""
    (RESULTS / "planner.md").write_text(text, encoding="utf-8")
    _draw(lines)


def tuned() -> None:
    """What the planner's constants would best be, from the runs that are not held out."""
    import numpy as np

    from metier.planning.clock import SCATTERED
    from metier.planning.estimate import HOLES

    lines = [line for line in _lines() if not line["is_held_out"]]

    def errors(workspace: int, holes: float) -> list[float]:
        found = []
        for line in lines:
            temporaries = line["predicted"]["temporaries"] / (1 + HOLES if line["checkpointing"] else 1)
            without = line["predicted_bytes"] - line["predicted"]["temporaries"] - line["predicted"]["workspace"]
            with_holes = temporaries * (1 + holes if line["checkpointing"] else 1)
            found.append((without + with_holes + workspace) / line["peak_bytes"] - 1)
        return sorted(found)

    # what is beside the tensors where nothing is computed again: the upper quartile, to the next 5 MiB
    plain = [line for line in lines if not line["checkpointing"]]
    beside = [line["peak_bytes"] - line["predicted_bytes"] + line["predicted"]["workspace"] for line in plain]
    workspace = 5 * round(quantiles(beside, n=4)[2] / (5 << 20))
    # and with it the most holes that keep the errors to the goals
    holes = 0.0
    for share in (0.02, 0.04, 0.06, 0.08, 0.1):
        found = errors(workspace << 20, share)
        sizes = sorted(map(abs, found))
        if median(sizes) <= 0.04 and sizes[int(0.95 * len(sizes))] <= 0.1:
            holes = share
    # how much longer products and attention, and memory traffic, take in a step, by least squares of relative errors
    parts = [
        {part: seconds / line["step_seconds"] for part, seconds in line["seconds_by_part"].items()} for line in lines
    ]
    by_themselves = np.array(
        [
            [
                (part["products"] + part["attention"]) / line["in_a_step"],
                part["memory traffic"] / line["in_a_step"] / SCATTERED,
            ]
            for part, line in zip(parts, lines, strict=True)
        ]
    )
    others = ("fresh memory", "overhead", "optimizer")
    left = np.array([1 - sum(part[name] for name in others) for part in parts])
    (computing, moving), *_ = np.linalg.lstsq(by_themselves, left, rcond=None)
    print(f"workspace {workspace} MiB, HOLES {holes}")
    print(f"IN_A_STEP {computing:.2f}, SCATTERED {moving / computing:.2f}")


def _summary(title: str, lines: list[dict[str, Any]], names: tuple[str, str]) -> str:
    lines = [line for line in lines if all(name in line for name in names)]
    if not lines:
        return f"| {title} | 0 | | | |{' |' if names != TIME else ''}"
    errors = sorted(_error(line, names) for line in lines)
    sizes = sorted(map(abs, errors))
    at_95 = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]
    under = f" {sum(error < -0.03 for error in errors)} |" if names != TIME else ""
    return f"| {title} | {len(lines)} | {median(sizes):.1%} | {at_95:.1%} | {errors[0]:+.1%} |{under}"


def _of_tensors(line: dict[str, Any]) -> str:
    """Measured, and the error of what was predicted; nothing where they were not counted yet."""
    if "tensor_bytes" not in line:
        return " | "
    return f"{line['tensor_bytes'] / 2**20:,.0f} | {_error(line, TENSORS):+.1%}"


def _error(line: dict[str, Any], names: tuple[str, str]) -> float:
    return float(line[names[0]] / line[names[1]] - 1)


def _draw(lines: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    for axes, names, unit, scale in zip(both, (MEMORY, TIME), ("MiB", "seconds a step"), (2**20, 1), strict=True):
        for is_held_out, marker, label in ((False, "o", "used while it was made"), (True, "s", "held out")):
            some = [line for line in lines if line["is_held_out"] == is_held_out]
            predicted, measured = ([line[name] / scale for line in some] for name in names)
            axes.scatter(measured, predicted, marker=marker, label=label, alpha=0.7)
        ends = [end(line[names[1]] for line in lines) / scale for end in (min, max)]
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}")
        axes.legend()
    figure.savefig(RESULTS / "planner.png", dpi=120)


if __name__ == "__main__":
    main()
