"""A base larger than the memory it is given, and a base in fewer bits.

    python benchmarks/frozen_base.py [--folder FOLDER]    twenty minutes on two cores, as root on Linux, 16 GB of disk

First: an OLMoE-shaped model (hidden size 1024, 64 experts of 512, top-8, 24 layers, bf16), two experts of four of
its layers trained by ESFT for 20 steps of 256 tokens, once in memory and once with its linear layers and experts on
disk, in a memory control group without swap that allows a third of those weights' bytes: what the process holds, mapped
files included, cannot be more. Loading happens inside the group too. There glibc gives
freed memory back (as it does in a run of metier with `base_store: disk`) and oneDNN keeps 64 kernels instead of 1,024,
which are hundreds of megabytes. The losses have to be the same to the bit. The
disk's own bandwidth is measured beside it, past the system's cache.

Second: the embedded model, trained by ESFT on `synopsis` (one pass, seed 0, the settings of quality.py, learning rate
2e-3) with its frozen weights as they are, in int8 and in NF4. Scores are on the whole test split, and forgetting is
against the base as it is.

Writes results/frozen_base.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path

from meft_disk import KEEP_MEMORY, bandwidth, disk_bytes, limited, own_bytes

RESULTS = Path(__file__).parent / "results"
LAYERS, BATCH, LENGTH, STEPS = 24, 1, 256, 20
TRAINED = {layer: [3, 40] for layer in (3, 9, 15, 21)}
WEIGHTS_OVER_LIMIT = 3.05
LEARNING_RATE = 2e-3
FORMATS = (None, "int8", "nf4")
SPARE_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def out_of_cache(folder: Path) -> None:
    """What lies in the cache because another process read or wrote it would not count for the group that reads it."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_base(folder: Path) -> None:
    from step_time import olmoe

    from metier import embedded

    olmoe(LAYERS, "grouped_mm").save_pretrained(folder, max_shard_size="500MB")
    for path in Path(embedded.model_path()).iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder / path.name)


def train(store: str, base: str, folder: str) -> None:
    """One side, in a process of its own: prints a line of JSON for the loading, and one a step."""
    import peft
    import torch
    from step_time import VOCAB

    import metier
    from metier.memory.frozen_model import frozen_weights
    from metier.methods.esft import EsftConfig

    started = time.perf_counter()
    loaded = metier.load(base) if store == "device" else metier.load_frozen(base, store=store, folder=folder)
    stores = [weight.store for weight in frozen_weights(loaded.model)]
    weights = sum(parameter.nbytes for path, parameter in loaded.model.named_parameters() if ".layers." in path)
    print(json.dumps({"loading": time.perf_counter() - started, "weights": weights}), flush=True)
    torch.manual_seed(0)
    model = peft.get_peft_model(loaded.model, EsftConfig(experts=TRAINED)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(STEPS):
        ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step % 4))
        started, read = time.perf_counter(), disk_bytes()[0]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        row = {
            "seconds": time.perf_counter() - started,
            "read": disk_bytes()[0] - read,
            "wanted": sum(store.meter.take().bytes_from_disk for store in stores),
            "own": own_bytes(),
            "loss": loss.item(),
        }
        print(json.dumps(row), flush=True)


def side(store: str, base: Path, folder: Path, limit: int | None) -> tuple[dict, list[dict], int]:
    """What was said of the loading, the steps, and the group's peak (0 without one)."""
    command = [sys.executable, __file__, "--side", store, str(base), "--folder", str(folder)]
    environment = {**os.environ, **(KEEP_MEMORY if limit is None else SPARE_MEMORY)}
    if limit is None:
        text, peak = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout, 0
    else:
        with limited(limit) as (group, peak_file):
            inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
            text = subprocess.run(inside, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            peak = int(peak_file.read_text())
    loading, *steps = map(json.loads, text.splitlines())
    print(store, f"loading {loading['loading']:.0f} s;", *(f"{row['seconds']:.1f}" for row in steps), flush=True)
    return loading, steps, peak


def larger_than_memory(folder: Path) -> list[str]:
    base = folder / "base"
    make_base(base)
    before = bandwidth(folder)
    loading, in_memory, _ = side("device", base, folder, None)
    limit = int(loading["weights"] / WEIGHTS_OVER_LIMIT)
    out_of_cache(base)
    loading_disk, on_disk, peak = side("disk", base, folder, limit)
    after = bandwidth(folder)
    losses = [[row["loss"] for row in rows] for rows in (in_memory, on_disk)]
    assert losses[0] == losses[1], f"the losses differ: {losses}"
    assert losses[0][-1] < losses[0][0], "nothing was learnt"
    fast, slow = (statistics.median(row["seconds"] for row in rows) for rows in (in_memory, on_disk))
    read = statistics.median(row["read"] for row in on_disk)
    disk = (before["read"] + after["read"]) / 2
    return [
        "## A base larger than memory",
        "",
        f"{loading['weights'] / 1e9:.2f} GB of weights in layers; the process on disk may use {limit / 1e9:.2f} GB.",
        "",
        "| | in memory | on disk |",
        "|-|-|-|",
        f"| loading | {loading['loading']:.0f} s | {loading_disk['loading']:.0f} s |",
        f"| median step | {fast:.2f} s | {slow:.2f} s, {slow / fast:.1f} times |",
        f"| range of steps | {_range(in_memory)} | {_range(on_disk)} |",
        f"| read from disk a step | | {read / 1e9:.2f} GB |",
        f"| the group's peak | | {peak / 1e9:.2f} GB |",
        f"| at most the process's own, in no file | {_own(in_memory)} | {_own(on_disk)} |",
        f"| loss at step 1, {STEPS // 2}, {STEPS} | {_some(losses[0])} | {_some(losses[1])}: all {STEPS} to the bit |",
        "",
        f"The disk itself reads {disk / 1e6:.0f} MB/s (mean of before and after); a step on disk reads "
        f"{read / slow / 1e6:.0f} MB/s over its whole time, computing included: {read / slow / disk:.0%}.",
        "",
    ]


def _range(rows: list[dict]) -> str:
    seconds = [row["seconds"] for row in rows]
    return f"{min(seconds):.2f} to {max(seconds):.2f} s"


def _own(rows: list[dict]) -> str:
    return f"{max(row['own'] for row in rows) / 1e9:.2f} GB"


def _some(losses: list[float]) -> str:
    return ", ".join(f"{losses[i]:.5f}" for i in (0, STEPS // 2 - 1, STEPS - 1))


def fewer_bits() -> list[str]:
    from quality import TOP_P, measure, run_config, task_profile
    from quality_report import forgetting
    from rich.console import Console

    import metier
    from metier.memory.frozen_model import frozen_weights
    from metier.routing.selection import SelectionConfig, select
    from metier.training.run import train

    base = metier.load("embedded", dtype="float32")
    before = measure(base.model, base.tokenizer, "synopsis")
    metric = next(iter(before["test"]))
    lines = ["## A base in fewer bits", "", f"| weights | bytes of them | base's {metric} | base forgets | trained | "]
    lines[-1] += "forgets | mean loss of the last 20 steps | median step |"
    lines.append("|-|-|-|-|-|-|-|-|")
    selection = select(task_profile("synopsis"), SelectionConfig(score="token", top_p=TOP_P))
    for name in FORMATS:
        stored = metier.load_frozen("embedded", dtype="float32", weight_format=name, store="host")
        num_bytes = sum(weight.store.num_bytes for weight in frozen_weights(stored.model))
        alone = measure(stored.model, stored.tokenizer, "synopsis")
        with tempfile.TemporaryDirectory() as folder:
            config = run_config(Path(folder), "synopsis", learning_rate=LEARNING_RATE, selection=selection)
            config = dataclasses.replace(config, base_store="host", base_format=name, logging_steps=1)
            started = time.perf_counter()
            result = train(config, console=Console(file=StringIO()))
            seconds = time.perf_counter() - started
            metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in metrics if "loss" in row]
        after = measure(result.model.eval(), result.tokenizer, "synopsis")
        lines.append(
            f"| {name or 'float32'} | {num_bytes / 1e6:.1f} MB | {alone['test'][metric]:.2f} "
            f"| {forgetting(alone, before):+.4f} | {after['test'][metric]:.2f} | {forgetting(after, before):+.4f} "
            f"| {statistics.mean(losses[-20:]):.4f} | {seconds / len(losses):.2f} s |"
        )
        print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk to be measured; a temporary one by default")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        train(*args.side, args.folder)
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        lines = larger_than_memory(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    intro = (__doc__ or "").split("16 GB of disk\n\n")[1].replace("Writes results/frozen_base.md.", "").strip()
    head = ["# The base's frozen weights", "", "    python benchmarks/frozen_base.py", "", intro, ""]
    text = "\n".join([*head, *lines, *fewer_bits()])
    print(text)
    (RESULTS / "frozen_base.md").write_text(text)


if __name__ == "__main__":
    main()
