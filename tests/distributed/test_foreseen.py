"""What `metier plan --world-size 2` says of a process, beside what two processes hold and send: equal to the byte."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed.launch import command
from metier.config_reading import load_run_config
from metier.planning.estimate import Estimate
from metier.planning.links import World
from metier.planning.plan import plan

ROWS = 0.1
"""Relative: which of a sparse adapter's blocks a step uses is an expectation, and the records are shorter than full
batches."""
RUNS: dict[str, dict[str, Any]] = {
    "esft": {"global_batch_size": 4},
    # with three batches a step
    "esft_batches": {"global_batch_size": 12, "select_top_k": 3, "max_steps": 2},
    "lora": {"model": "dense", "method": "lora", "select_top_k": None},
}
MORE: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "select_top_k": None},
    "expert_lora": {"method": "expert_lora", "global_batch_size": 4},
    "esft_checkpointing": {"gradient_checkpointing": True},
    "houlsby": {"model": "dense", "method": "houlsby", "select_top_k": None},
    "meft": {"method": "meft", "meft_r": 64, "select_top_k": None},
}


def counted(runs: dict[str, dict[str, Any]], way: str, world: Path, tmp_path: Path, run_file: Any) -> dict[str, Any]:
    """What the two processes count of each run."""
    paths = []
    for name, changes in runs.items():
        changes = {"max_steps": 3, **changes, "model": str(world / changes.get("model", "moe"))}
        paths.append(str(run_file(name, **changes)))
    script, out = str(Path(__file__).with_name("counting.py")), tmp_path / "counted.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = command([sys.executable, *launcher, script, str(out), *paths, *(["--fsdp"] if way == "fsdp2" else [])])
    assert done.code == 0, done.text
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def foreseen(path: Path, way: str) -> Estimate:
    made = plan(load_run_config(str(path), []), device_memory="8GiB", world=World(2))
    (row,) = (row for row in made.rows if row.way == way)
    assert row.estimate is not None, row.why_not
    return row.estimate


def check(name: str, way: str, found: dict[str, Any], tmp_path: Path) -> None:
    said, sent, held = foreseen(tmp_path / f"{name}.yaml", way), found["sent"], found["held"]
    assert said.on_rank is not None
    device, told = said.device_bytes, said.on_rank.sent
    # of what two processes gather or scatter each sends a half; of what they sum up each sends as much as it has
    assert told.get("all-gather", 0) == sent.get("all-gather", 0) / 2, name
    assert told.get("reduce-scatter", 0) == sent.get("reduce-scatter", 0) / 2, name
    if said.config.method == "meft":
        summed = told["all-reduce"] + told["all-reduce of rows"]
        assert summed == pytest.approx(sent["all-reduce"], rel=ROWS), name
        return
    assert told.get("all-reduce", 0) == sent.get("all-reduce", 0), name
    assert device["optimizer state"] == held["optimizer state"], name
    assert device["trained weights"] == held["gradients"], name
    if said.config.gradient_accumulation_steps > 1 and way == "fsdp2":
        assert device["gradients"] == held["gradients between batches"] > held["gradients"], name
    if way == "fsdp2":
        measured = json.loads((tmp_path / name / "plan.json").read_text())["measured"]
        # what is no parameter, such as the experts' numbers, is whole in each
        weights = device["frozen weights"] - said.state.kept_bytes + device["trained weights"]
        assert weights == measured["weight_bytes_per_process"], name


@pytest.mark.distributed
def test_shards_are_foreseen_to_the_byte(world: Path, tmp_path: Path, run_file: Callable[..., Path]) -> None:
    found = counted(RUNS, "fsdp2", world, tmp_path, run_file)
    for name in RUNS:
        check(name, "fsdp2", found[name], tmp_path)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("way", "runs"), [("fsdp2", MORE), ("ddp", RUNS | MORE)])
def test_what_is_held_and_sent_is_foreseen(
    way: str, runs: dict[str, dict[str, Any]], world: Path, tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    found = counted(runs, way, world, tmp_path, run_file)
    for name in runs:
        check(name, way, found[name], tmp_path)
