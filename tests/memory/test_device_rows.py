"""Rows that a device cannot address: fetched once a step, kept while hot, and the same numbers as in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from metier.memory import RowAdamW, RowStore
from metier.memory.step_gradients import StepGradients

CPU = torch.device("cpu")
N, M, D = 6, 3, 4
ROW_BYTES = 2 * D * 4
STATE_BYTES = 2 * ROW_BYTES + 4
"""Two moments and a count of steps."""
STEPS = ([0, 1], [0, 2], [0, 1], [3, 0], [0, 1], [4, 1], [0, 5])


def store_of(**options) -> StepGradients:
    store = RowStore(N, M, D, tier="host", **options)
    store.rows_NMWD.copy_(torch.randn(N, M, 2, D, generator=torch.Generator().manual_seed(0)))
    return StepGradients(store)


def backward(gradients: StepGradients, blocks: list[int], seed: int) -> list[Tensor]:
    """What a pass does: read rows, and leave gradients that depend on them; all but the last row of a block fire."""
    read = gradients.store.blocks(blocks, CPU, keep=True)
    places, fired, is_new = gradients.places(blocks, CPU)
    noise = torch.randn(len(blocks), M, 2, D, generator=torch.Generator().manual_seed(seed))
    for rows, place, flags, new, extra in zip(read, places, fired, is_new, noise, strict=True):
        gradient = rows + extra
        gradient[-1] = 0
        place.copy_(gradient if new else place + gradient)
        flags[:-1] = True
    return list(read)


def trained(gradients: StepGradients, steps=STEPS, **options) -> RowAdamW:
    optimizer = RowAdamW([gradients.holder], lr=1e-2, weight_decay=0.1, **options)
    for number, blocks in enumerate(steps):
        for micro in range(2):
            backward(gradients, blocks, 2 * number + micro)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("num_hot", [0, 1, 3, N])
def test_fetched_and_kept_rows_end_as_rows_in_place_do(mode, state_dtype, num_hot):
    in_place, remote = store_of(), store_of(is_remote=True, cache_bytes=num_hot * M * (ROW_BYTES + STATE_BYTES))
    options = {"mode": mode, "state_dtype": state_dtype}
    expected, got = trained(in_place, **options), trained(remote, **options)
    states = [optimizer.state_dict()["state"][0] for optimizer in (expected, got)]
    for name in ("exp_avg", "exp_avg_sq", "steps"):
        assert torch.equal(states[0][name], states[1][name]), name
    assert mode == "lazy" or states[0]["steps"].eq(len(STEPS)).all()
    assert torch.equal(remote.store.saved(), in_place.store.saved())
    assert remote.store.on_device is not None
    assert bool(remote.store.on_device.slots) == bool(num_hot)


def test_rows_are_fetched_once_a_step_and_only_what_is_missing():
    gradients = store_of(is_remote=True)
    meter, block_bytes = gradients.store.meter, M * ROW_BYTES
    backward(gradients, [0, 1], 0)
    assert (meter.num_fetched, meter.bytes_to_device) == (2, 2 * block_bytes)
    backward(gradients, [0, 1, 2], 1)
    assert (meter.num_fetched, meter.bytes_to_device) == (3, 3 * block_bytes)
    assert meter.bytes_from_device == 0
    optimizer = RowAdamW([gradients.holder], lr=1e-2)
    optimizer.step()
    assert meter.bytes_from_device == 3 * block_bytes
    assert (meter.num_asked, meter.num_moved) == (3, 3)
    optimizer.zero_grad()
    backward(gradients, [0], 2)
    assert meter.num_fetched == 4


def test_hot_blocks_do_not_travel():
    gradients = store_of(is_remote=True, cache_bytes=2 * M * (ROW_BYTES + STATE_BYTES))
    optimizer = trained(gradients, [[0, 1]] * 3)
    gradients.store.meter.take()
    for seed in range(3):
        backward(gradients, [0, 1], seed)
        optimizer.step()
        optimizer.zero_grad()
    taken = gradients.store.meter.take()
    assert (taken.num_asked, taken.num_moved, taken.num_fetched) == (6, 0, 0)
    assert taken.bytes_to_device == taken.bytes_from_device == 0
    assert taken.num_rows_updated == 3 * 2 * (M - 1)


def test_the_cache_keeps_to_its_bytes():
    gradients = store_of(is_remote=True, cache_bytes=2 * M * (ROW_BYTES + STATE_BYTES) + 1)
    trained(gradients)
    on_device = gradients.store.on_device
    assert len(on_device.slots) == 2
    held = sum(on_device.array(name).nbytes for name in gradients.store.arrays)
    assert held == 2 * M * (ROW_BYTES + STATE_BYTES)


def test_what_is_not_to_be_kept_is_fetched_again():
    gradients = store_of(is_remote=True)
    gradients.store.blocks([0, 1], CPU, keep=False)
    gradients.store.blocks([0], CPU, keep=False)
    assert gradients.store.meter.num_fetched == 3


def test_new_rows_are_seen_at_once():
    gradients = store_of(is_remote=True, cache_bytes=N * M * (ROW_BYTES + STATE_BYTES))
    trained(gradients)
    gradients.store.load(torch.full((N * M, 2, D), 7.0))
    assert all(block.eq(7).all() for block in gradients.store.blocks(list(range(N)), CPU, keep=True))


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_resumed_run_with_hot_blocks_goes_on_to_the_same_numbers(tmp_path, mode, dtype, state_dtype):
    options = {"is_remote": True, "cache_bytes": 2 * M * (ROW_BYTES + STATE_BYTES), "dtype": dtype}
    kept = {"mode": mode, "state_dtype": state_dtype}
    whole = store_of(**options)
    optimizer = trained(whole, STEPS[:4], **kept)
    hot = dict(whole.store.on_device.slots)
    saved = whole.store.saved().clone()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = store_of(**options)
    trained(again, [[3], [4, 5]], **kept)  # something else is hot there
    assert again.store.on_device.slots != hot
    again.store.load(saved)
    resumed = RowAdamW([again.holder], lr=1e-2, weight_decay=0.1, **kept)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    again.store.blocks([0], CPU, keep=False)
    assert again.store.on_device.slots == hot
    for each, gradients in ((optimizer, whole), (resumed, again)):
        for number, blocks in enumerate(STEPS[4:]):
            backward(gradients, blocks, number)
            each.step()
            each.zero_grad()
    assert torch.equal(again.store.saved(), whole.store.saved())


def test_what_was_kept_on_a_device_is_there_when_the_model_comes_back():
    gradients = store_of(is_remote=True, cache_bytes=N * M * (ROW_BYTES + STATE_BYTES))
    trained(gradients, STEPS[:3])
    kept = [block.clone() for block in gradients.store.blocks([0, 1], CPU, keep=False)]
    assert gradients.store.on_device.slots
    gradients.store.is_remote = False  # as of a device that can address the store
    assert all(map(torch.equal, gradients.store.blocks([0, 1], CPU, keep=False), kept))
    assert gradients.store.on_device is None


def test_one_set_of_pinned_buffers_serves_all_layers():
    first, second = (store_of(is_remote=True) for _ in range(2))
    for gradients in (first, second):
        gradients.store.blocks([0], CPU, keep=False)
    assert first.store.on_device._ring is second.store.on_device._ring


def test_a_state_takes_the_place_of_that_of_hot_blocks_and_leaves_their_rows():
    gradients = store_of(is_remote=True, cache_bytes=N * M * (ROW_BYTES + STATE_BYTES))
    optimizer = trained(gradients, STEPS[:3])
    early = copy.deepcopy(optimizer.state_dict())
    backward(gradients, [0, 1], 50)
    optimizer.step()
    optimizer.zero_grad()
    assert gradients.store.on_device.slots
    rows = [block.clone() for block in gradients.store.blocks(list(range(N)), CPU, keep=True)]
    optimizer.load_state_dict(early)
    assert all(map(torch.equal, gradients.store.blocks(list(range(N)), CPU, keep=True), rows))
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], early["state"][0]["exp_avg"])
