"""A checkpoint of some processes goes on in any other number of them, sharded or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

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


def gone_on(before: Side, after: Side, folder: Path, file: Path) -> str:
    """A run that `before` began and `after` took up again from its checkpoint in the middle, in `folder`/run; as it would
    have gone straight on it is in `folder`/straight. What the second said."""
    done = start(before, str(file))
    assert done.code == 0, done.text
    shutil.copytree(folder / "run", folder / "straight")
    shutil.rmtree(folder / "run" / "checkpoints" / "checkpoint-10")
    shutil.rmtree(folder / "run" / "adapter")
    again = start(after, str(file), "--resume_from_checkpoint", "last")
    assert again.code == 0, again.text
    return again.text


def adapters(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Of the straight run, and of the one that was taken up again."""
    return (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "run"))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_another_number_of_processes_goes_on(
    before: Side, after: Side, tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    assert "checkpoint-5" in gone_on(before, after, tmp_path, run_file("run", save_steps=5))
    straight, resumed = losses(tmp_path / "straight"), losses(tmp_path / "run")
    assert len(resumed) == 10
    for step, line in straight.items():
        assert resumed[step]["loss"] == pytest.approx(line["loss"], rel=LOSS)
        assert resumed[step]["num_tokens"] == line["num_tokens"]
    rows, others = adapters(tmp_path)
    for name, tensor in rows.items():
        assert (tensor - others[name]).abs().max() < ROWS, name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("after", [(2, ""), (2, "--fsdp")], ids=str)
def test_rows_in_stores_go_on_to_the_same_bits(after: Side, tmp_path: Path, run_file: Callable[..., Path]) -> None:
    options = {"method": "meft", "meft_r": 64, "save_steps": 5, "select_top_k": None}
    gone_on(after, after, tmp_path, run_file("run", **options))
    rows, others = adapters(tmp_path)
    for name, tensor in rows.items():
        assert (tensor == others[name]).all(), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("after", [(2, ""), ONE], ids=str)
def test_a_sparse_delta_goes_on_with_the_entries_of_its_checkpoint(
    after: Side, world: Path, tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    options = {"model": str(world / "dense"), "method": "fishmask", "save_steps": 5, "select_top_k": None}
    gone_on((2, ""), after, tmp_path, run_file("run", **options))
    entries, others = adapters(tmp_path)
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
