"""What of a run in several processes needs none: batches, refusals, words, restarts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.config import RunConfig
from metier.distributed.parting import for_ranks, global_batch
from metier.distributed.ranks import Ranks, largest, on_main, ranks_here, summed, total
from metier.errors import ConfigError, RunError
from metier.memory import step_gradients
from metier.memory.row_store import RowStore
from metier.memory.step_gradients import StepGradients
from metier.training.processes import (
    check_world,
    describe,
    load_everywhere,
    lost_peers_told,
    note_world,
)
from metier.training.run import _opened

TWO = Ranks(rank=0, size=2, local_size=2)


def config(**changes: object) -> RunConfig:
    return RunConfig(model="base", dataset="records.jsonl", output_dir="run", **changes)  # type: ignore[arg-type]


@given(at_once=st.integers(1, 8), batches=st.integers(1, 8), size=st.integers(1, 64))
def test_a_global_batch_is_parted_among_any_number_of_processes(at_once: int, batches: int, size: int) -> None:
    ranks = Ranks(size=size)
    run = config(per_device_train_batch_size=at_once, global_batch_size=at_once * batches * size)
    parted = for_ranks(run, ranks)
    assert parted.gradient_accumulation_steps == batches
    assert global_batch(parted, ranks) == run.global_batch_size


def test_a_global_batch_that_cannot_be_parted_says_so() -> None:
    with pytest.raises(
        ConfigError, match="global_batch_size: got 6, which 2 processes with per_device_train_batch_size 4"
    ):
        for_ranks(config(per_device_train_batch_size=4, global_batch_size=6), TWO)


def test_two_keys_for_the_batches_of_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"and so does gradient_accumulation_steps\. Leave one of them out"):
        config(global_batch_size=8, gradient_accumulation_steps=2)


def test_one_process_has_nothing_to_shard_over() -> None:
    with pytest.raises(ConfigError, match="fsdp: there is one process, so nothing to shard over"):
        for_ranks(config(fsdp=True), Ranks())


@pytest.mark.parametrize("method", ["mezo", "lisa", "galore", "adalora", "lora_fa"])
def test_a_procedure_of_one_process_is_refused_by_name(method: str) -> None:
    with pytest.raises(ConfigError, match=f"method: {method} does not run in several processes: .*Start one"):
        for_ranks(config(method=method), TWO)


@pytest.mark.parametrize("method", ["norms", "fishmask", "diff_pruning"])
def test_entries_of_weights_are_not_written_into_shards(method: str) -> None:
    with pytest.raises(ConfigError, match=f"fsdp: {method} writes single entries into the base's weights"):
        for_ranks(config(method=method, fsdp=True), TWO)
    for_ranks(config(method=method), TWO)


def test_rows_that_replicas_cannot_have_are_refused_before_anything_is_loaded() -> None:
    rows = {"method": "meft", "meft_r": 64, "meft_update": "exact", "meft_row_dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"meft_update: exact rounds .* at random.*Use meft_update: lazy"):
        for_ranks(config(**rows), TWO)
    for_ranks(config(**rows), Ranks())
    rows = {"method": "meft", "meft_r": 64, "meft_store": "disk"}
    with pytest.raises(ConfigError, match=r"meft_store: rows on disk belong to one process.*Use host"):
        for_ranks(config(**rows), TWO)
    for_ranks(config(**rows), Ranks())


def test_a_base_in_a_store_is_not_sharded_too() -> None:
    with pytest.raises(ConfigError, match="fsdp shards the base's weights over processes"):
        config(fsdp=True, base_store="host")


def test_the_launchers_sharding_must_be_the_second_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="expected fsdp_version: 2"):
        for_ranks(config(), TWO)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match="the launcher's configuration shards them"):
        for_ranks(config(base_store="host"), TWO)
    assert "FSDP2" in describe(for_ranks(config(), TWO), TWO)


def test_no_process_is_left_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert load_everywhere(config()) is None
    told = load_everywhere(config(fsdp=True))
    assert told is not None
    assert "fsdp_cpu_ram_efficient_loading is turned off" in told
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert load_everywhere(config(fsdp=True)) is None


def test_a_checkpoint_of_another_batch_is_refused(tmp_path: Path) -> None:
    note_world(tmp_path, config(per_device_train_batch_size=4), TWO)
    check_world(tmp_path, config(per_device_train_batch_size=8), Ranks())
    with pytest.raises(RunError, match="made by 2 processes with 8 records a step; 1 would now have 4, another run"):
        check_world(tmp_path, config(per_device_train_batch_size=4), Ranks())
    (tmp_path / "old").mkdir()
    check_world(tmp_path / "old", config(), Ranks())  # of a version that wrote nothing down


def test_one_process_is_the_plain_thing() -> None:
    assert ranks_here() == Ranks()
    assert on_main(lambda: 3) == 3
    assert largest(2.0) == total(2.0) == 2.0
    tensor = torch.ones(2)
    assert summed(tensor) is not tensor
    assert summed(tensor).tolist() == [1, 1]


def test_a_run_that_the_launcher_starts_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(model="base", dataset="records.jsonl", output_dir=str(tmp_path / "run"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    folder, first, checkpoint = _opened(run, run, Ranks())
    assert (first.resume_from_checkpoint, checkpoint) == (None, None)
    marked = folder.checkpoints / "checkpoint-3"
    marked.mkdir(parents=True)
    (marked / "complete").write_text("3\n")
    _, again, checkpoint = _opened(run, run, Ranks())
    assert (again.resume_from_checkpoint, checkpoint) == ("last", marked)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(RunError, match="holds a run already"):
        _opened(run, run, Ranks())


def test_a_lost_process_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metier.training import processes
    from metier.training.folder import RunFolder

    monkeypatch.setattr(processes, "ranks_here", lambda: TWO)
    with (
        pytest.raises(RunError, match=r"process 0 of 2: another process of the run is gone(.|\n)*begins again"),
        lost_peers_told(RunFolder(tmp_path)),
    ):
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:8613")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), lost_peers_told(RunFolder(tmp_path)):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@given(
    mine=st.lists(st.integers(0, 6), unique=True),
    theirs=st.lists(st.integers(0, 6), unique=True),
    seed=st.integers(0, 9),
)
def test_replicas_have_the_mean_gradient_of_all_blocks_used_in_one_order(
    mine: list[int], theirs: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = [torch.zeros(7, 3, 2, 4), torch.zeros(7, 3, 2, 4)]
    flags = [torch.zeros(7, 3, dtype=torch.bool), torch.zeros(7, 3, dtype=torch.bool)]
    replicas = []
    for number, blocks in enumerate((mine, theirs)):
        gradients = StepGradients(RowStore(7, 3, 4))
        for block in blocks:
            (place,), (fired,), _ = gradients.places([block], torch.device("cpu"))
            place.copy_(torch.randn(3, 2, 4, generator=generator))
            fired[block % 3] = True
            dense[number][block], flags[number][block] = place, fired
        replicas.append(gradients)
    union = sorted({*mine, *theirs})
    waiting = iter_of_sums(union, dense, flags)
    original = step_gradients.summed
    step_gradients.summed, sizes = waiting, step_gradients.ranks_here
    step_gradients.ranks_here = lambda: TWO
    try:
        replicas[0].average_over_ranks()
    finally:
        step_gradients.summed, step_gradients.ranks_here = original, sizes
    assert replicas[0].block_ids == union
    if union:
        expected = (dense[0] + dense[1])[union] / 2
        torch.testing.assert_close(replicas[0].holder.grad, expected)
        assert torch.equal(replicas[0].fired_GM, (flags[0] | flags[1])[union])


def iter_of_sums(union: list[int], dense: list[torch.Tensor], flags: list[torch.Tensor]):
    """Stands for the sum over two processes, of which this is the first: adds what the second would send."""
    theirs_used = torch.zeros(7, dtype=torch.int64)
    theirs_used[[block for block in union if dense[1][block].abs().sum() > 0]] = 1

    def add(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.int64:
            return tensor + theirs_used
        return tensor + (dense[1][union] if tensor.dim() == 4 else flags[1][union].to(torch.int32))

    return add
