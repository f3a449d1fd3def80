"""A checkpoint of some processes goes on in any other number of them, sharded or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distributed.launch import Launched, command, losses, metier_command, torchrun

LOSS, ROWS = 1e-6, 1e-5
"""Relative; rows are of size 0.1. What differs is the order of float32 sums."""
Side = tuple[int, str]
ONE: Side = (1, "")
PAIRS: list[tuple[Side, Side]] = [
    ((2, ""), ONE),
    ((2, ""), (4, "--fsdp")),
    ((2, "--fsdp"), ONE),
    ((2, "--fsdp"), (4, "")),
    ((4, "--fsdp"), (2, "--fsdp")),
    (ONE, (2, "")),
    (ONE, (2, "--fsdp")),
]


def start(side: Side, *arguments: str) -> Launched:
    processes, sharded = side
    words = ["train", *arguments, *([sharded] if sharded else [])]
    return command(metier_command(*words)) if processes == 1 else torchrun(processes, *words)


def without_the_last(folder: Path) -> None:
    """The run as it was after its checkpoint in the middle."""
    shutil.rmtree(folder / "checkpoints" / "checkpoint-10")
    shutil.rmtree(folder / "adapter")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_another_number_of_processes_goes_on(
    before: Side, after: Side, tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    done = start(before, str(run_file("run", save_steps=5)))
    assert done.code == 0, done.text
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    without_the_last(tmp_path / "run")
    again = start(after, str(run_file("run", save_steps=5)), "--resume_from_checkpoint", "last")
    assert again.code == 0, again.text
    assert "checkpoint-5" in again.text
    straight, resumed = losses(tmp_path / "straight"), losses(tmp_path / "run")
    assert len(resumed) == 10
    for step, line in straight.items():
        assert resumed[step]["loss"] == pytest.approx(line["loss"], rel=LOSS)
        assert resumed[step]["num_tokens"] == line["num_tokens"]
    rows, others = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "run")
    )
    for name, tensor in rows.items():
        assert (tensor - others[name]).abs().max() < ROWS, name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("after", [(2, ""), (2, "--fsdp")], ids=str)
def test_rows_in_stores_go_on_to_the_same_bits(after: Side, tmp_path: Path, run_file: Callable[..., Path]) -> None:
    options = {"method": "meft", "meft_r": 64, "save_steps": 5, "select_top_k": None}
    done = start(after, str(run_file("run", **options)))
    assert done.code == 0, done.text
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    without_the_last(tmp_path / "run")
    again = start(after, str(run_file("run", **options)), "--resume_from_checkpoint", "last")
    assert again.code == 0, again.text
    rows, others = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "run")
    )
    for name, tensor in rows.items():
        assert (tensor == others[name]).all(), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("after", [(2, ""), ONE], ids=str)
def test_a_sparse_delta_goes_on_with_the_entries_of_its_checkpoint(
    after: Side, world: Path, tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    options = {"model": str(world / "dense"), "method": "fishmask", "save_steps": 5, "select_top_k": None}
    done = start((2, ""), str(run_file("run", **options)))
    assert done.code == 0, done.text
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    without_the_last(tmp_path / "run")
    again = start(after, str(run_file("run", **options)), "--resume_from_checkpoint", "last")
    assert again.code == 0, again.text
    entries, others = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "run")
    )
    assert entries.keys() == others.keys()
    assert any(".sparse_delta_indices_" in name for name in entries)
    for name, tensor in entries.items():
        assert (tensor - others[name]).abs().max() < ROWS, name


@pytest.mark.distributed
@pytest.mark.slow
def test_another_number_of_records_a_step_is_refused(tmp_path: Path, run_file: Callable[..., Path]) -> None:
    options = {"save_steps": 5, "global_batch_size": None}
    done = start((2, ""), str(run_file("run", **options)))
    assert done.code == 0, done.text
    again = start(ONE, str(run_file("run", **options)), "--resume_from_checkpoint", "last")
    assert again.code == 2
    assert "was made by 2 processes with 4 records a step; 1 would now have 2, another run" in again.text
