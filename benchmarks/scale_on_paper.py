"""On paper: what Qwen3-235B-A22B and DeepSeek-V3 would take on 1 to 64 accelerators. Nothing here is measured.

    python benchmarks/scale_on_paper.py     about three minutes, without weights and without an accelerator

Counts and traces each model from its configuration, once a method, and works out what one of so many processes holds
and sends. Writes docs/scale-on-paper.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from metier.config import RunConfig
from metier.planning.devices import device_of
from metier.planning.estimate import Estimate, Estimator
from metier.planning.fit import Budget, changed
from metier.planning.links import World, links_of
from metier.planning.pays import where_sharding_pays
from metier.planning.sharding import GATHERED, RankEstimator
from metier.planning.spelling import count, duration, size

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale-on-paper.md"
MODELS = ("Qwen3-235B-A22B", "DeepSeek-V3")
NUMBERS = (1, 2, 4, 8, 16, 32, 64)
DEVICE, LINKS = "h100", "nvlink4,infiniband-ndr"
COMMON = {
    "model": "-", "dataset": "-", "output_dir": "-", "dtype": "bfloat16", "bf16": True, "max_length": 4096,
    "per_device_train_batch_size": 1, "gradient_checkpointing": True,
}  # fmt: skip
LORA = "LoRA on attention, rank 8"
RUNS = {
    "ESFT, a tenth of the experts": RunConfig(method="esft", select_top_fraction=0.1, **COMMON),
    LORA: RunConfig(method="lora", targets="attention", **COMMON),
    "full fine-tuning": RunConfig(method="full", **COMMON),
}
WAYS = {"DDP": False, "FSDP2": True}
HEAD = """# On paper: 235 and 671 billion parameters on 1 to 64 accelerators

**On paper: nothing here was measured.** No model of this size was loaded, and no accelerator was there. Bytes are
counted from configurations written by the models' public hyperparameters, activations are traced on a CPU without
numbers, and seconds are by the makers' figures. What two processes on CPUs hold of weights, gradients and optimizer
state, and what they send, equals such a plan to the byte (`tests/distributed/test_foreseen.py`). Peaks in several
processes, NCCL and links were never compared with anything.

Written by `python benchmarks/scale_on_paper.py`. An H100 has {memory}, and eight are in a machine: NVLink within it
(450 GB/s each way) and InfiniBand NDR between machines (50 GB/s for each accelerator), of which 80% are taken to be
reached. The base is in bfloat16 and what is trained in float32, with mixed precision (`bf16: true`). Each process has
one record of 4,096 tokens a step, so that 64 have 64; gradient checkpointing, AdamW. Seconds of sending are those of
such a step with nothing computed meanwhile; what of them is hidden behind computing is not known.

For a model of your own:

```
metier plan --model config.json --world-size 64 --device h100 --link nvlink4,infiniband-ndr
```
"""
TAIL = """## What the figures say

- **Copies do not fit, whatever their number.** With DDP each process has the whole model; more of them change nothing.
- **Shards stop at a parameter's first axis.** FSDP2 divides each parameter along it and pads. ESFT's delta bank of a
  layer has one slice for each trained expert (13 in Qwen3-235B-A22B, 26 in DeepSeek-V3), a LoRA of rank 8 has eight,
  the base's banks 128 and 256. More processes than that gain nothing: 64 hold one expert of 13 or padding. What is
  gathered and reduced is padded too, so that each sends *more*. torch can shard another axis (`shard_placement_fn`);
  accelerate does not ask it to.
- **Two layers are gathered at a time,** the one in use and the next, whatever the number of processes. In DeepSeek-V3
  they are, with what stays gathered, {gathered} in each process: more processes do not help, dividing a layer would.
- **Frozen weights are most of what is sent,** twice a batch, trained or not: LoRA on attention, which trains a
  hundredth of a percent, sends six to nine tenths of what ESFT does. Several batches a step gather again for each of
  them, and gradients stay whole in each process until the last one: all of ESFT's delta banks.
- **The link between machines decides.** From 16 on the ring goes over InfiniBand, a ninth as fast as NVLink. A ring
  within machines with another between them (HSDP) is not planned for.
- Loading is not in the tables: each process reads the whole model into its host's memory first
  ([scale.md](scale.md)); of DeepSeek-V3 that is {base} in each of eight processes of a machine.
"""


def estimators() -> Iterator[tuple[str, Estimator]]:
    """One a model: it keeps what it has traced for all numbers of processes."""
    sys.path.insert(0, str(ROOT / "tests"))
    from planning.known_configs import KNOWN_CONFIGS

    for name in MODELS:
        yield name, Estimator(KNOWN_CONFIGS[name](), has_host=True)


def table(title: str, estimator: Estimator, cell: Callable[[Estimate], str]) -> list[str]:
    """A row for each run and way, a column for each number of processes."""
    lines = [f"| {title} | | {' | '.join(map(str, NUMBERS))} |", f"|-|-|{'-:|' * len(NUMBERS)}"]
    for name, config in RUNS.items():
        for way, sharded in WAYS.items():
            cells = [
                "" if number == 1 and sharded else cell(RankEstimator(estimator, number)(run))
                for number in NUMBERS
                for run in (changed(config, {"fsdp": sharded}),)
            ]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return [*lines, ""]


def section(name: str, estimator: Estimator, budget: Budget) -> list[str]:
    """Three tables of a model, and from which number on each run fits."""

    def held(estimate: Estimate) -> str:
        total = size(estimate.total_device_bytes)
        return f"**{total}**" if budget.fits(estimate) else total

    def on_rank(estimate: Estimate) -> tuple[int, float]:
        assert estimate.on_rank is not None, "of one process of several"
        seconds = World(estimate.on_rank.world_size, links=links_of(LINKS)).seconds(estimate.on_rank.sent_bytes)
        assert seconds is not None, "links are named"
        return estimate.on_rank.sent_bytes, seconds

    trained = {run: estimator(config).state.num_trained for run, config in RUNS.items()}
    parameters = trained["full fine-tuning"]
    lines = [f"## {name}", "", f"{count(parameters)} parameters. Trained: "]
    lines[-1] += "; ".join(f"{run} {count(number)}" for run, number in trained.items()) + "."
    lines += ["", "Bytes at the peak of a step, of one process; what fits is bold.", ""]
    lines += table("held", estimator, held)
    lines += ["Bytes that a process sends in a step.", ""]
    lines += table("sent", estimator, lambda estimate: size(on_rank(estimate)[0]))
    lines += ["Seconds of sending them.", ""]
    lines += table(
        "sending", estimator, lambda estimate: duration(on_rank(estimate)[1]) if on_rank(estimate)[0] else "0"
    )
    for run, config in RUNS.items():
        pays = where_sharding_pays(config, estimator, lambda _: budget, 64)
        assert pays is not None, "both ways are there"
        lines.append(f"- {run}: {str(pays).partition(': ')[2]}")
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    device = device_of(DEVICE)
    budget = Budget(device.memory_bytes, 1 << 50)
    lines = [HEAD.format(memory=size(device.memory_bytes))]
    base = gathered = 0
    for name, estimator in estimators():
        lines += section(name, estimator, budget)
        largest = RankEstimator(estimator, NUMBERS[-1])(changed(RUNS[LORA], {"fsdp": True}))
        base, gathered = largest.state.base_bytes, largest.device_bytes[GATHERED]
    return "\n".join(lines) + "\n" + TAIL.format(base=size(base), gathered=size(gathered))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
