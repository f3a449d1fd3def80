"""RowAdamW against torch's dense AdamW, and what it owes a trainer: schedules, clipping, states, refusals."""

# N blocks, M rows a block, D hidden_size

from __future__ import annotations

import copy
import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metier.errors import ConfigError, RowStoreError
from metier.memory import RowAdamW, RowStore, row_state, row_update
from metier.memory.step_gradients import StepGradients

N, M, D = 5, 3, 4
EXACT = {"rtol": 1e-6, "atol": 1e-7}
"""The issue's bound; what differs is one rounding where many decays are one product."""


def rows(seed: int = 0) -> Tensor:
    return torch.randn(N, M, 2, D, generator=torch.Generator().manual_seed(seed))


def store_of(values: Tensor, **options) -> StepGradients:
    store = RowStore(N, M, D, **options)
    store.rows_NMWD.copy_(values)
    return StepGradients(store)


def give(gradients: StepGradients, dense: Tensor, blocks: list[int], fired: Tensor | None = None) -> None:
    """Leave gradients as a backward pass would: `blocks` read, then those of fired rows added."""
    gradients.store.blocks(blocks, torch.device("cpu"), keep=True)
    places, flags, is_new = gradients.places(blocks, torch.device("cpu"))
    for block, place, flag, new in zip(blocks, places, flags, is_new, strict=True):
        place.copy_(dense[block] if new else place + dense[block])
        flag |= (dense[block] != 0).flatten(1).any(1) if fired is None else fired[block]


def sparse_gradient(blocks: list[int], seed: int) -> Tensor:
    """Gradients of two of the three rows of those blocks."""
    dense = torch.zeros(N, M, 2, D)
    dense[blocks] = torch.randn(len(blocks), M, 2, D, generator=torch.Generator().manual_seed(seed))
    dense[:, seed % M] = 0
    return dense


def dense_adamw(values: Tensor, **options) -> tuple[nn.Parameter, torch.optim.AdamW]:
    parameter = nn.Parameter(values.clone())
    return parameter, torch.optim.AdamW([parameter], fused=True, **options)


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("chunk_bytes", [row_update.CHUNK_BYTES, 100])
def test_with_every_row_used_both_modes_are_dense_adamw(mode, chunk_bytes, monkeypatch):
    monkeypatch.setattr(row_update, "CHUNK_BYTES", chunk_bytes)
    parameter, dense = dense_adamw(rows(), lr=1e-2, weight_decay=0.1)
    gradients = store_of(rows())
    sparse = RowAdamW([gradients.holder], lr=1e-2, weight_decay=0.1, mode=mode)
    for step in range(6):
        parameter.grad = torch.randn(N, M, 2, D, generator=torch.Generator().manual_seed(step))
        give(gradients, parameter.grad, list(range(N)))
        dense.step()
        sparse.step()
        sparse.zero_grad()
    assert torch.equal(gradients.store.rows_NMWD, parameter)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=3, unique=True), min_size=1, max_size=12))
def test_exact_updates_are_dense_adamws_whatever_rows_a_step_uses(steps):
    parameter, dense = dense_adamw(rows(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))
    gradients = store_of(rows())
    sparse = RowAdamW([gradients.holder], lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), mode="exact")
    for number, blocks in enumerate(steps):
        rate = 1e-2 * (1 - number / 20)  # a schedule: what was missed is taken with the rates of its time
        dense.param_groups[0]["lr"] = sparse.param_groups[0]["lr"] = rate
        parameter.grad = sparse_gradient(blocks, number)
        give(gradients, parameter.grad, blocks)
        torch.testing.assert_close(gradients.store.rows_NMWD[blocks], parameter.detach()[blocks], **EXACT)
        dense.step()
        sparse.step()
        sparse.zero_grad()
    torch.testing.assert_close(gradients.store.saved().view(N, M, 2, D), parameter.detach(), **EXACT)
    state, expected = sparse.state_dict()["state"][0], dense.state[parameter]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name].view(N, M, 2, D), expected[name], **EXACT)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("beta1", "num_missed"), [(0.9, 255), (0.9, 456), (0.97, 456), (0.0, 30)])
def test_a_long_rest_is_caught_up(beta1, num_missed, weight_decay):
    betas = (beta1, 0.999)
    parameter, dense = dense_adamw(rows(), lr=1e-2, weight_decay=weight_decay, betas=betas)
    gradients = store_of(rows())
    sparse = RowAdamW([gradients.holder], lr=1e-2, weight_decay=weight_decay, betas=betas, mode="exact")
    for step in range(num_missed + 2):
        blocks = [0, 1] if step == 0 else [2]
        parameter.grad = sparse_gradient(blocks, step)
        give(gradients, parameter.grad, blocks)
        dense.step()
        sparse.step()
        sparse.zero_grad()
    saved = gradients.store.saved().view(N, M, 2, D)
    # 450 decays of 1e-3, each rounded by dense AdamW: their sum errs by more than one product
    torch.testing.assert_close(saved, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_long_rest_decays_once_whatever_the_state_is_kept_in(state_dtype):
    parameter, dense = dense_adamw(rows(), lr=1e-2, weight_decay=0.5)
    gradients = store_of(rows())
    sparse = RowAdamW([gradients.holder], lr=1e-2, weight_decay=0.5, mode="exact", state_dtype=state_dtype)
    for step in range(100):
        blocks = [0, 1] if step == 0 else [2]
        parameter.grad = sparse_gradient(blocks, step)
        give(gradients, parameter.grad, blocks)
        dense.step()
        sparse.step()
        sparse.zero_grad()
    saved, rested = gradients.store.saved().view(N, M, 2, D), [0, 1, 3, 4]
    # a first step is as large as its sign, so moments of 8 bits change it by some percent of lr, ten times over
    torch.testing.assert_close(saved[rested], parameter.detach()[rested], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("beta1", "num_steps"), [(0.0, 1), (0.9, 256), (0.99, 2681)])
def test_momentum_is_followed_until_nothing_is_left_of_it(beta1, num_steps):
    history = row_update.StepHistory([row_update.StepSettings(1e-3, 0.0, beta1=beta1)])
    assert history.most_missed == num_steps
    assert beta1**num_steps <= row_update.LEAST_MOMENTUM


def test_lazy_updates_leave_other_rows_at_rest_and_count_for_each_row():
    gradients = store_of(rows())
    sparse = RowAdamW([gradients.holder], lr=1e-2, weight_decay=0.1)
    for step in range(4):
        blocks = [0, 2] if step % 2 else [2]
        give(gradients, sparse_gradient(blocks, 0), blocks)
        sparse.step()
        sparse.zero_grad()
    now, before = gradients.store.rows_NMWD, rows()
    assert torch.equal(now[[1, 3, 4]], before[[1, 3, 4]])
    assert torch.equal(now[:, 0], before[:, 0])
    counts = sparse.state_dict()["state"][0]["steps"].view(N, M)
    assert counts.tolist() == [[0, 2, 2], [0, 0, 0], [0, 4, 4], [0, 0, 0], [0, 0, 0]]
    # row (0, 1) saw two steps of its own, and dense AdamW in two steps gives it the same
    parameter, dense = dense_adamw(before[0, 1], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        parameter.grad = sparse_gradient([0, 2], 0)[0, 1]
        dense.step()
    torch.testing.assert_close(now[0, 1], parameter.detach(), **EXACT)


def updates_in_place(patch: pytest.MonkeyPatch) -> list[int]:
    """How many rows are updated where they lie, call by call from now on."""
    calls, update = [], row_update._update_in_place

    def counted(chunks, pieces, *rest):
        calls.append(len(pieces.row_ids))
        update(chunks, pieces, *rest)

    patch.setattr(row_update, "_update_in_place", counted)
    return calls


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True), st.integers(0, 99)),
        min_size=1,
        max_size=6,
    ),
    mode=st.sampled_from(["lazy", "exact"]),
)
def test_rows_are_updated_in_place_to_the_bits_of_copies(steps, mode):
    stores = []
    for in_place_bytes in (0, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_update, "IN_PLACE_BYTES", in_place_bytes)
            calls = updates_in_place(patch)
            store = RowStore(N, M, 8)
            store.rows_NMWD.copy_(torch.randn(N, M, 2, 8, generator=torch.Generator().manual_seed(0)))
            gradients = StepGradients(store)
            sparse = RowAdamW([gradients.holder], lr=1e-2, weight_decay=0.1, mode=mode)
            for blocks, seed in steps:
                generator = torch.Generator().manual_seed(seed)
                dense = torch.randn(N, M, 2, 8, generator=generator)
                give(gradients, dense, blocks, torch.rand(N, M, generator=generator) < 0.6)
                sparse.step()
                sparse.zero_grad()
            assert sum(calls) == (0 if in_place_bytes else store.meter.num_rows_updated)
            sparse.state_dict()
        stores.append(store)
    for name in ("rows", "exp_avg", "exp_avg_sq", "steps"):
        assert torch.equal(stores[0].array(name), stores[1].array(name)), name


def test_neighbours_whose_gradients_lie_apart_are_updated_in_place_each_with_its_own(monkeypatch):
    stores = []
    monkeypatch.setattr(row_update, "IN_PLACE_BYTES", 1)
    for in_place in (True, False):
        store = RowStore(1, 4, 8)
        store.rows_NMWD.copy_(torch.arange(64.0).view(1, 4, 2, 8))
        row_state.add_state(store, "float32")
        chunks = row_update.RowChunks(store, "float32")
        assert chunks.can_be_in_place
        chunks.can_be_in_place = in_place
        grads = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        places = torch.tensor([2, 0, 1, 3])
        row_update.update_rows(chunks, torch.arange(4), grads, places, row_update.StepSettings(1e-2, 0.1), seed=0)
        assert torch.equal(store.array("exp_avg"), grads[places] * (1 - 0.9))
        stores.append(store)
    assert torch.equal(stores[0].rows_NMWD, stores[1].rows_NMWD)


@pytest.mark.parametrize(
    ("hidden_size", "state_dtype", "row_dtype", "row_ids", "in_place"),
    [
        (2048, "float32", "float32", range(0, 8, 2), True),
        (2040, "float32", "float32", range(0, 8, 2), False),
        # half as wide, but two and two side by side
        (1024, "float32", "float32", (0, 1, 3, 4), True),
        (1024, "float32", "float32", (0, 1, 3, 5), False),
        (8, "float32", "float32", range(8), False),
        # not of 16 numbers a piece
        (2052, "float32", "float32", range(8), False),
        (2048, "bfloat16", "float32", range(8), False),
        (2048, "float32", "bfloat16", range(8), False),
    ],
)
def test_only_long_pieces_that_are_float32_throughout_are_updated_in_place(
    hidden_size, state_dtype, row_dtype, row_ids, in_place, monkeypatch
):
    store = RowStore(2, 4, hidden_size, dtype=getattr(torch, row_dtype))
    row_state.add_state(store, state_dtype)
    calls, ids = updates_in_place(monkeypatch), torch.tensor(list(row_ids))
    settings_of_step, grads = row_update.StepSettings(1e-2, 0.1), torch.ones(len(ids), 2 * hidden_size)
    chunks = row_update.RowChunks(store, state_dtype)
    row_update.update_rows(chunks, ids, grads, torch.arange(len(ids)), settings_of_step, seed=0)
    assert calls == ([len(ids)] if in_place else [])
    assert store.array("steps").flatten().nonzero().flatten().tolist() == ids.tolist()


def test_ordinary_parameters_get_torchs_adamw():
    values, gradients = torch.randn(3, 4), store_of(rows())
    mine, theirs = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    sparse = RowAdamW([{"params": [mine, gradients.holder]}], lr=1e-2, weight_decay=0.1)
    dense = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(3):
        mine.grad = theirs.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        sparse.step()
        dense.step()
    assert torch.equal(mine, theirs)


def run(optimizer: RowAdamW, gradients: StepGradients, steps: range) -> Tensor:
    for step in steps:
        blocks = [step % N, (step * 2 + 1) % N] if step % N != (step * 2 + 1) % N else [step % N]
        give(gradients, sparse_gradient(blocks, step), blocks)
        optimizer.step()
        optimizer.zero_grad()
    return gradients.store.saved().clone()


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_to_the_same_bits(tier, mode, state_dtype, row_dtype, tmp_path):
    options = {"lr": 1e-2, "weight_decay": 0.1, "mode": mode, "state_dtype": state_dtype, "seed": 3}
    whole = store_of(rows(), tier=tier, dtype=row_dtype)
    first = RowAdamW([whole.holder], **options)
    run(first, whole, range(5))
    saved = whole.store.saved().clone()
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    expected = run(first, whole, range(5, 9))

    again = store_of(saved.view(N, M, 2, D), tier=tier, dtype=row_dtype)
    second = RowAdamW([again.holder], **options)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert torch.equal(run(second, again, range(5, 9)), expected)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_smaller_states_follow_the_float32_one(state_dtype):
    final = {}
    for kind in ("float32", state_dtype):
        gradients = store_of(rows())
        optimizer = RowAdamW([gradients.holder], lr=1e-2, state_dtype=kind)
        for _ in range(60):
            target = gradients.store.rows_NMWD - 1  # the gradient of ½‖row − 1‖²
            give(gradients, target.clone(), list(range(N)))
            optimizer.step()
            optimizer.zero_grad()
        final[kind] = gradients.store.rows_NMWD.clone()
    moved = (final["float32"] - rows()).norm()
    assert (final[state_dtype] - final["float32"]).norm() < 0.05 * moved


def test_a_tiny_second_moment_in_8_bits_does_not_become_a_huge_step():
    gradients = store_of(torch.zeros(N, M, 2, D))
    optimizer = RowAdamW([gradients.holder], lr=1e-2, state_dtype="int8", weight_decay=0.0)
    for step in range(30):
        # one large gradient is long forgotten by the first moment when it still sets the scale of the second
        dense = torch.full((N, M, 2, D), 1e-4)
        dense[..., 0] = float(step == 0)
        give(gradients, dense, list(range(N)))
        optimizer.step()
        optimizer.zero_grad()
    assert gradients.store.rows_NMWD.abs().max() <= 30 * 1e-2


def test_small_updates_of_bfloat16_rows_arrive_in_the_mean():
    gradients = store_of(torch.ones(N, M, 2, D), dtype=torch.bfloat16)
    optimizer = RowAdamW([gradients.holder], lr=1e-4, weight_decay=0.0)
    for _ in range(200):
        give(gradients, torch.ones(N, M, 2, D), list(range(N)))
        optimizer.step()
        optimizer.zero_grad()
    # a bfloat16 near 1 has steps of 2^-8: rounding to nearest would leave all of them at 1
    assert gradients.store.rows_NMWD.float().mean() == pytest.approx(1 - 200 * 1e-4, abs=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["rows", "ordinary"])
def test_a_gradient_that_is_no_number_stops_the_step_before_anything_moved(value, where):
    gradients, other = store_of(rows(), name="layers.0.mlp"), nn.Parameter(torch.ones(2))
    optimizer = RowAdamW([other, gradients.holder], lr=1e-2)
    dense = sparse_gradient([1], 0)
    other.grad = torch.ones(2)
    if where == "rows":
        dense[1, 1, 0, 0] = value
    else:
        other.grad[1] = value
    give(gradients, dense, [1])
    name = "layers.0.mlp" if where == "rows" else r"shape \[2\]"
    with pytest.raises(RowStoreError, match=f"{name}.*nothing was updated"):
        optimizer.step()
    assert torch.equal(gradients.store.rows_NMWD, rows())
    assert torch.equal(other, torch.ones(2))
    optimizer.zero_grad()
    assert gradients.holder.grad is None


def test_large_but_finite_gradients_are_taken():
    gradients = store_of(rows())
    optimizer = RowAdamW([gradients.holder], lr=1e-2)
    give(gradients, torch.full((N, M, 2, D), 3e38), [0])
    optimizer.step()
    assert not torch.equal(gradients.store.rows_NMWD[0], rows()[0])


def test_gradients_set_to_zero_in_place_do_not_count_twice():
    gradients = store_of(rows())
    optimizer = RowAdamW([gradients.holder], lr=1e-2)
    for set_to_none in (False, True):
        give(gradients, sparse_gradient([0], 0), [0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    give(gradients, sparse_gradient([1], 0), [1])
    assert gradients.block_ids == [1]


@pytest.mark.parametrize("change", ["dtype", "shape", "history"])
def test_the_state_of_other_rows_is_refused_and_nothing_is_loaded(change):
    gradients = store_of(rows())
    optimizer = RowAdamW([gradients.holder], lr=1e-2)
    run(optimizer, gradients, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    if change == "dtype":
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].bfloat16()
    elif change == "shape":
        state["state"][0]["steps"] = state["state"][0]["steps"][:-1]
    else:
        del state["state"][0]["history"]
    fresh = store_of(rows())
    other = RowAdamW([fresh.holder], lr=1e-2)
    with pytest.raises(RowStoreError, match="nothing was loaded"):
        other.load_state_dict(state)
    assert not fresh.store.array("steps").any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "mode must be one of lazy, exact"),
        ({"state_dtype": "float16"}, "state_dtype must be one of"),
        ({"lr": -1.0}, "at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RowAdamW([store_of(rows()).holder], **options)


def test_two_stores_are_rounded_by_numbers_of_their_own():
    both = [store_of(torch.ones(N, M, 2, D), dtype=torch.bfloat16) for _ in range(2)]
    optimizer = RowAdamW([gradients.holder for gradients in both], lr=1e-3)
    for gradients in both:
        give(gradients, torch.ones(N, M, 2, D), list(range(N)))
    optimizer.step()
    assert not torch.equal(both[0].store.rows_NMWD, both[1].store.rows_NMWD)


def test_rows_that_fired_stay_flagged_when_more_blocks_join():
    gradients = store_of(rows())
    optimizer = RowAdamW([gradients.holder], lr=1e-2)
    give(gradients, sparse_gradient([0], 0), [0])
    give(gradients, sparse_gradient([1, 2, 3, 4], 0), [1, 2, 3, 4])
    optimizer.step()
    moved = (gradients.store.rows_NMWD != rows()).flatten(2).any(-1)
    assert moved.tolist() == [[False, True, True]] * N


@pytest.mark.parametrize(("was", "now"), [("lazy", "exact"), ("exact", "lazy")])
def test_a_state_of_another_mode_is_refused(was, now):
    gradients = store_of(rows())
    optimizer = RowAdamW([gradients.holder], mode=was)
    give(gradients, torch.ones(N, M, 2, D), [0, 1])
    optimizer.step()
    other = store_of(rows())
    with pytest.raises(RowStoreError, match=f"state of mode '{was}'.*nothing was loaded.\\nResume with mode '{was}'"):
        RowAdamW([other.holder], mode=now).load_state_dict(optimizer.state_dict())
    assert not other.store.array("steps").any()


def test_a_disk_without_room_for_moments_is_told_before_the_first_step(tmp_path, monkeypatch):
    gradients = store_of(rows(), tier="disk", folder=tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RowStoreError, match=r"exp_avg: cannot reserve 480 bytes \(No space left on device\)"):
        RowAdamW([gradients.holder])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.rows"]


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize(("num_rows", "width"), [(12, 64), (3000, 512), (12, 4096)])
def test_what_updates_gather_is_what_the_planner_counts(num_rows, width, mode, state_dtype, monkeypatch):
    row_update._buffers.cache_clear()
    made, plain = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(plain(*a, **k)) or made[-1])
    gradients = StepGradients(RowStore(num_rows // 3, 3, width))
    optimizer = RowAdamW([gradients.holder], mode=mode, state_dtype=state_dtype)
    for blocks in ([0], [0, 1]):
        gradients.store.blocks(blocks, torch.device("cpu"), keep=True)
        for place, flag in zip(*gradients.places(blocks, torch.device("cpu"))[:2], strict=True):
            place.fill_(1)
            flag.fill_(True)
        optimizer.step()
        optimizer.zero_grad()
    of_buffers = sum(tensor.nbytes for tensor in made if tensor.dim() == 3 and len(tensor) == 4)
    expected = row_update.buffer_bytes(
        num_rows, width, torch.float32, state_dtype, is_exact=mode == "exact", on_cpu=True
    )
    assert of_buffers == expected
    row_update._buffers.cache_clear()


def stepped(optimizer: torch.optim.Optimizer, gradients: StepGradients, blocks: list[int], seed: int) -> Tensor:
    """Take a step on some blocks; returns their dense gradient."""
    dense = sparse_gradient(blocks, seed)
    give(gradients, dense, blocks)
    optimizer.step()
    optimizer.zero_grad()
    return dense


@pytest.mark.parametrize("on_device", [{}, {"is_remote": True, "cache_bytes": 1 << 20}])
@pytest.mark.parametrize("second", ["lazy", "exact"])
def test_a_second_optimizer_on_the_same_rows_begins_where_the_first_had_them(second, on_device):
    options = {"lr": 0.1, "weight_decay": 0.1}
    gradients, (parameter, dense) = store_of(rows(), **on_device), dense_adamw(rows(), **options)
    first = RowAdamW([gradients.holder], mode="exact", **options)
    for step, blocks in enumerate([[0, 1], [2], [3]]):
        parameter.grad = stepped(first, gradients, blocks, step)
        dense.step()
    # block 0 is owed the decay and the momentum of two steps, block 4 nothing but decay
    after = RowAdamW([gradients.holder], mode=second, **options)
    before = parameter.detach().clone()
    parameter.grad = stepped(after, gradients, [0], 7)
    torch.optim.AdamW([parameter], fused=True, **options).step()
    saved = gradients.store.saved().view(N, M, 2, D)
    fired = (parameter.grad != 0).flatten(2).any(2)
    torch.testing.assert_close(saved[fired], parameter.detach()[fired], **EXACT)
    resting = before if second == "lazy" else parameter.detach()
    torch.testing.assert_close(saved[1:], resting[1:], **EXACT)


def test_rows_that_are_loaded_are_owed_nothing():
    gradients = store_of(rows())
    optimizer = RowAdamW([gradients.holder], lr=0.1, weight_decay=0.1, mode="exact")
    stepped(optimizer, gradients, [0, 1], 0)
    stepped(optimizer, gradients, [2], 1)
    wanted = rows(5).view(-1, 2, D)
    gradients.store.load(wanted)
    assert torch.equal(gradients.store.saved(), wanted)


def test_gradients_of_blocks_that_were_not_read_here_come_after_what_those_are_owed():
    """As in several processes: another one has used them."""
    options = {"lr": 0.1, "weight_decay": 0.1}
    gradients, (parameter, dense) = store_of(rows()), dense_adamw(rows(), **options)
    optimizer = RowAdamW([gradients.holder], mode="exact", **options)
    for step, blocks in enumerate([[0, 1], [2], [0, 3]]):
        parameter.grad = sparse_gradient(blocks, step)
        places, flags, _ = gradients.places(blocks, torch.device("cpu"))
        for block, place, flag in zip(blocks, places, flags, strict=True):
            place.copy_(parameter.grad[block])
            flag |= (parameter.grad[block] != 0).flatten(1).any(1)
        optimizer.step()
        optimizer.zero_grad()
        dense.step()
    torch.testing.assert_close(gradients.store.saved().view(N, M, 2, D), parameter.detach(), **EXACT)


def test_a_state_of_which_one_store_does_not_fit_is_loaded_into_none():
    def two(columns: int) -> tuple[StepGradients, StepGradients]:
        return store_of(rows()), StepGradients(RowStore(N, M, columns))

    there, here = two(D), two(2 * D)
    saved = RowAdamW([one.holder for one in there], lr=0.5)
    for one in there:
        give(one, sparse_gradient([0], 0), [0])
    saved.step()
    optimizer = RowAdamW([one.holder for one in here], lr=0.1)
    with pytest.raises(RowStoreError, match="nothing was loaded"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not here[0].store.array("exp_avg").any()


def test_rows_rest_where_gradients_are_set_to_zero_instead_of_none():
    gradients = store_of(rows())
    optimizer = RowAdamW([gradients.holder], lr=0.1, weight_decay=0.1)
    give(gradients, sparse_gradient([0], 0), [0])
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = gradients.store.saved().clone().view(N, M, 2, D)
    give(gradients, sparse_gradient([1], 1), [1])
    optimizer.step()
    assert torch.equal(gradients.store.saved().view(N, M, 2, D)[0], before[0])


def test_before_the_first_step_there_is_no_state_of_rows(tmp_path):
    gradients = store_of(rows(), tier="disk", folder=tmp_path)
    optimizer = RowAdamW([gradients.holder])
    assert "exp_avg" in gradients.store.arrays
    assert optimizer.state_dict()["state"] == {}


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    """Of rows that are wide enough, whose updates are made in buffers that stay."""
    gradients = StepGradients(RowStore(2, 1, 2048, tier="device"))
    optimizer = RowAdamW([gradients.holder], mode="exact", lr=0.1)

    def step(block: int) -> None:
        give_ones(gradients, block)
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    step(1)
    row_update._buffers.cache_clear()
    with torch.inference_mode():
        gradients.store.blocks([0], torch.device("cpu"), keep=False)
    step(0)
    step(1)
    assert all(not array.is_inference() for array in gradients.store.arrays.values())


def test_a_loaded_count_of_steps_is_where_the_parameter_is():
    """A trainer reads checkpoints into the host's memory, and the fused kernel wants the count on the device."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = RowAdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    moved: list[torch.device] = []

    class Count(torch.Tensor):
        def to(self, device, *args, **kwargs):
            moved.append(device)
            return self.as_subclass(torch.Tensor)

    state = optimizer.state[parameter]
    state["step"] = state["step"].as_subclass(Count)
    optimizer.step()
    assert moved == [parameter.device]


def test_a_state_of_before_the_first_step_leaves_no_moments():
    gradients = store_of(rows())
    optimizer = RowAdamW([gradients.holder], mode="exact")
    fresh = optimizer.state_dict()
    stepped(optimizer, gradients, [0], 0)
    optimizer.load_state_dict(fresh)
    assert not any(gradients.store.array(name).any() for name in ("exp_avg", "exp_avg_sq", "steps"))
    assert optimizer.state_dict()["state"] == {}


def test_saving_in_inference_mode_leaves_buffers_for_training():
    gradients = StepGradients(RowStore(2, 1, 2048))
    optimizer = RowAdamW([gradients.holder], mode="exact")
    for block in (0, 1):
        give_ones(gradients, block)
        optimizer.step()
        optimizer.zero_grad()
    row_update._buffers.cache_clear()
    with torch.inference_mode():
        gradients.store.saved()
    give_ones(gradients, 0)
    optimizer.step()


def give_ones(gradients: StepGradients, block: int) -> None:
    gradients.store.blocks([block], torch.device("cpu"), keep=True)
    places, flags, _ = gradients.places([block], torch.device("cpu"))
    places[0].fill_(1.0)
    flags[0].fill_(True)
