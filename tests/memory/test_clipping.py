"""Clipping where rows are among what is clipped: against torch's own, in memory and on disk."""

# N blocks, M rows a block, D hidden_size

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metier.errors import RowStoreError
from metier.memory import RowAdamW, RowStore, clip_grad_norm_, row_store
from metier.memory.disk_cache import DiskCache
from metier.memory.step_gradients import StepGradients

N, M, D = 5, 3, 4
CPU = torch.device("cpu")


def add(gradients: StepGradients, blocks: list[int], seed: int = 0) -> None:
    """As a backward pass would."""
    places, flags, is_new = gradients.places(blocks, CPU)
    for block, place, flag, new in zip(blocks, places, flags, is_new, strict=True):
        values = 3 * torch.randn(M, 2, D, generator=torch.Generator().manual_seed(100 * seed + block))
        place.copy_(values if new else place + values)
        flag.fill_(True)


def case(tier: str) -> tuple[StepGradients, nn.Parameter]:
    gradients, gate = StepGradients(RowStore(N, M, D, tier=tier)), nn.Parameter(torch.ones(7))
    add(gradients, [3, 0, 4])
    gate.grad = torch.arange(7.0)
    return gradients, gate


def stepped(gradients: StepGradients, gate: nn.Parameter) -> list[Tensor]:
    # eps as large as this makes AdamW depend on how large gradients are
    RowAdamW([gate, gradients.holder], lr=1e-2, eps=1.0).step()
    return [gradients.store.saved().clone(), gate.detach().clone()]


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, float("inf")])
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_it_is_torchs_clipping(tier: str, max_norm: float, group_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metier.memory.step_gradients.GROUP_BYTES", group_bytes)
    one, other = case("host"), case(tier)
    expected = nn.utils.clip_grad_norm_([one[1], one[0].holder], max_norm)
    torch.testing.assert_close(clip_grad_norm_([other[1], other[0].holder], max_norm), expected)
    for got, wanted in zip(stepped(*other), stepped(*one), strict=True):
        torch.testing.assert_close(got, wanted)


def test_what_lies_on_disk_is_not_written_for_it() -> None:
    gradients, gate = case("disk")
    before = gradients.holder.grad.clone()
    clip_grad_norm_([gate, gradients.holder], 0.5)
    assert torch.equal(gradients.holder.grad, before)
    again = clip_grad_norm_([gate, gradients.holder], 0.5)
    assert float(again) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_what_comes_after_it_is_added_to_what_was_clipped(tier: str) -> None:
    gradients, gate = case(tier)
    norm = float(clip_grad_norm_([gate, gradients.holder], 0.5))
    before = case("host")[0].holder.grad.clone()
    add(gradients, [3], seed=1)
    last = 3 * torch.randn(M, 2, D, generator=torch.Generator().manual_seed(103))
    expected = before * (0.5 / norm) + torch.stack([last, torch.zeros_like(last), torch.zeros_like(last)])
    torch.testing.assert_close(gradients.holder.grad, expected)


def test_what_was_given_up_is_clipped_all_the_same_before_more_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room in memory for two blocks of eight, of the size of a page."""
    monkeypatch.setattr("metier.memory.disk_cache.BATCH_BYTES", 0)
    monkeypatch.setattr("metier.memory.step_gradients.GROUP_BYTES", 1)
    cache = DiskCache(most_bytes=2 << 12)
    monkeypatch.setattr(row_store, "disk_cache", lambda: cache)
    found = []
    for tier in ("host", "disk"):
        gradients = StepGradients(RowStore(8, 1, 512, tier=tier))
        for first in (0, 2, 4, 6):
            blocks = [first, first + 1]
            for place, flag in zip(*gradients.places(blocks, CPU)[:2], strict=True):
                place.copy_(torch.randn(1, 2, 512, generator=torch.Generator().manual_seed(first)))
                flag.fill_(True)
            gradients.changed(blocks)
        clip_grad_norm_([gradients.holder], 0.5)
        assert gradients.scale < 1 or tier == "host"
        (place,), *_ = gradients.places([3], CPU)
        place += 1
        gradients.changed([3])
        RowAdamW([gradients.holder], lr=1e-2, eps=1.0).step()
        found.append(gradients.store.saved().clone())
    assert torch.equal(*found)


def test_a_new_step_begins_unclipped() -> None:
    gradients, gate = case("disk")
    clip_grad_norm_([gate, gradients.holder], 0.5)
    gradients.holder.grad = None
    add(gradients, [1])
    assert gradients.scale == 1


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_optimizer_does_not_look_again_unless_somebody_has_written(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, gate = case(tier)
    optimizer = RowAdamW([gate, gradients.holder])
    clip_grad_norm_([gate, gradients.holder], 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(StepGradients, "parts", lambda _: pytest.fail("it has read them again"))
        optimizer.step()
    gradients.holder.grad[1, 2, 0, 0] = torch.nan
    with pytest.raises(RowStoreError, match="not finite; nothing was updated"):
        optimizer.step()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_norm_that_is_not_finite_leaves_the_error_to_the_step(value: float) -> None:
    gradients, gate = case("disk")
    gradients.holder.grad[1, 2, 0, 0] = value
    norm = clip_grad_norm_([gate, gradients.holder], 0.5)
    assert not torch.isfinite(norm)
    with pytest.raises(RowStoreError, match="not finite; nothing was updated"):
        RowAdamW([gate, gradients.holder]).step()
