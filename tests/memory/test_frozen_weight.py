"""A parameter whose numbers live in a store behaves as the plain tensor does, and reads no more than is needed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.errors import ConfigError, ModelError, RowStoreError
from metier.memory import frozen_store, mapped_file
from metier.memory.disk_cache import DiskCache
from metier.memory.frozen_store import FrozenLayer, FrozenOrder, FrozenStore
from metier.memory.frozen_weight import FrozenWeight, frozen

CPU = torch.device("cpu")


def _frozen(
    weight: Tensor,
    folder: Path,
    *,
    tier: str = "host",
    format_name: str | None = None,
    layer: FrozenLayer | None = None,
) -> nn.Parameter:
    store = FrozenStore(
        "w",
        tuple(weight.shape),
        weight.dtype,
        tier=tier,
        format_name=format_name,
        folder=folder,
        layer=layer or FrozenLayer(FrozenOrder()),
    )
    store.fill(weight)
    return nn.Parameter(frozen(store, CPU), requires_grad=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Which weights of a stack were read, call by call."""
    seen: list[list[int]] = []
    want = FrozenStore._want

    def spy(self: FrozenStore, indices) -> None:
        seen.append(list(indices))
        want(self, indices)

    monkeypatch.setattr(FrozenStore, "_want", spy)
    return seen


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_has_the_same_output_and_gradient_to_the_bit(tmp_path, tier, dtype):
    weight = torch.randn(96, 64).to(dtype)
    inputs = torch.randn(5, 64).to(dtype).requires_grad_()
    want = F.linear(inputs, weight)
    (want_grad,) = torch.autograd.grad(want.square().sum(), inputs)
    got = F.linear(inputs, _frozen(weight, tmp_path, tier=tier))
    assert type(got) is Tensor
    (got_grad,) = torch.autograd.grad(got.square().sum(), inputs)
    assert torch.equal(got, want)
    assert torch.equal(got_grad, want_grad)


def test_a_product_over_a_stack_has_the_same_output_and_gradient(tmp_path):
    stack = torch.randn(4, 64, 32)
    inputs = torch.randn(12, 32, requires_grad=True)
    offsets = torch.tensor([3, 3, 8, 12], dtype=torch.int32)
    outs = [
        F.grouped_mm(inputs, weights.transpose(-2, -1), offs=offsets) for weights in (stack, _frozen(stack, tmp_path))
    ]
    grads = [torch.autograd.grad(out.square().sum(), inputs)[0] for out in outs]
    assert torch.equal(*outs)
    assert torch.equal(*grads)


def test_what_autograd_keeps_is_the_parameter_and_no_numbers(tmp_path):
    weight = _frozen(torch.randn(64, 64), tmp_path, format_name="int8")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        F.linear(torch.randn(2, 64, requires_grad=True), weight)
    assert [type(tensor) for tensor in kept] == [FrozenWeight]


def test_choosing_and_transposing_reads_nothing(tmp_path, reads):
    weight = _frozen(torch.randn(6, 4, 8), tmp_path)
    some = weight[1:5].mT[2]
    assert isinstance(some, FrozenWeight)
    assert (tuple(some.shape), some.stride()) == ((8, 4), (1, 8))
    assert weight.transpose(1, 2).shape == (6, 8, 4)
    assert reads == []
    some.numbers()
    assert reads == [[3]]


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w[2],
        lambda w: w[-1],
        lambda w: w[1:3],
        lambda w: w[2:],
        lambda w: w[:-1][1],
        lambda w: w[1:][1:3],
        lambda w: w[2:][torch.tensor([1, 0])],
        lambda w: w.mT,
        lambda w: w.mT[1].T,
        lambda w: w[1:4].transpose(-1, -2)[0],
        lambda w: w[torch.tensor([3, 0, 3])],
        lambda w: w.mT[torch.tensor([-1])],
        lambda w: w[w.new_ones(5).bool()],
        lambda w: w[:, 1],
        lambda w: w[..., 2:4],
        lambda w: w.permute(2, 0, 1),
        lambda w: w.reshape(-1),
        lambda w: w[1].to(torch.float64),
        lambda w: w[::2],
        lambda w: w[3:1],
        lambda w: w + 1,
    ],
)
def test_every_way_to_look_at_it_shows_the_same_numbers(tmp_path, view):
    stack = torch.randn(5, 4, 6)
    want, got = view(stack), view(_frozen(stack, tmp_path))
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    plain = got.numbers() if isinstance(got, FrozenWeight) else got
    assert torch.equal(plain, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "view", [lambda w: w[1:3], lambda w: w[2], lambda w: w.mT, lambda w: w.detach(), lambda w: w * 2]
)
def test_views_are_made_in_inference_mode_too(tmp_path, view, mode):
    stack = torch.randn(5, 4, 6)
    weight = _frozen(stack, tmp_path)
    with mode():
        got = view(weight)
        assert torch.equal(got.numbers() if isinstance(got, FrozenWeight) else got, view(stack))


def test_experts_by_their_ids_are_all_that_is_read(tmp_path, reads):
    weight = _frozen(torch.randn(6, 4, 8), tmp_path)
    weight.detach()[torch.tensor([5, 2])].float()
    assert reads == [[5, 2]]


def test_another_dtype_is_made_when_it_is_read(tmp_path, reads):
    module = nn.Linear(8, 4, bias=False)
    numbers = module.weight.detach().clone()
    module.weight = _frozen(numbers, tmp_path)
    module.to(torch.bfloat16)
    assert isinstance(module.weight, FrozenWeight)
    assert module.weight.dtype == torch.bfloat16
    assert reads == []
    inputs = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(module(inputs), F.linear(inputs, numbers.bfloat16()))


def test_a_deep_copy_is_an_ordinary_parameter(tmp_path):
    weight = _frozen(torch.randn(3, 4, 8), tmp_path)
    copied = copy.deepcopy(weight)
    assert type(copied) is nn.Parameter
    assert not copied.requires_grad
    assert torch.equal(copied, weight.detach().numbers())
    with torch.no_grad():
        copied.zero_()
    assert weight.detach().numbers().any()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.zeros(3, 4, 8)),
        lambda w: w.__setitem__(torch.tensor([1]), 0.0),
        lambda w: w[1].mul_(2),
    ],
)
def test_nobody_can_write_into_it(tmp_path, write):
    stack = torch.randn(3, 4, 8)
    weight = _frozen(stack, tmp_path)
    with torch.no_grad(), pytest.raises(ModelError, match=r"w: is frozen in a store \(host\) and cannot be written"):
        write(weight)
    assert torch.equal(weight.detach().numbers(), stack)


def test_a_store_on_disk_leaves_no_file_behind(tmp_path):
    weight = _frozen(torch.randn(64, 64), tmp_path, tier="disk")
    assert list(tmp_path.iterdir()) == []
    assert weight.detach().numbers().isfinite().all()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped_file.os, "posix_fallocate", full)
    with pytest.raises(RowStoreError, match=r"w\.weights: cannot reserve 16,384 bytes \(No space left on device\)"):
        _frozen(torch.randn(64, 64), tmp_path, tier="disk")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tier_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="store: must be one of device, host, disk, got 'tape'"):
        _frozen(torch.randn(4, 4), tmp_path, tier="tape")


def test_the_next_layer_is_read_while_one_is_used(tmp_path, monkeypatch):
    cache = DiskCache(most_bytes=1 << 30)
    monkeypatch.setattr(frozen_store, "disk_cache", lambda: cache)
    order = FrozenOrder()
    weights = [_frozen(torch.randn(64, 64), tmp_path, tier="disk", layer=FrozenLayer(order)) for _ in range(3)]
    files = [weight.detach().store._file for weight in weights]
    for file in files:
        cache.forget(file, 1)
    hidden = torch.randn(2, 64, requires_grad=True)
    first = F.linear(hidden, weights[0])
    assert [bool(file.last_call) for file in files] == [True, True, False]
    second = F.linear(first, weights[1])
    third = F.linear(second, weights[2])
    for file in files[:2]:
        cache.forget(file, 1)
    torch.autograd.grad(third.sum(), second)
    assert order.now == ("backward", 2)
    assert [bool(file.last_call) for file in files] == [False, True, True]


def test_of_a_stack_on_disk_only_what_the_last_pass_read_is_read_ahead(tmp_path, monkeypatch):
    cache = DiskCache(most_bytes=1 << 30)
    monkeypatch.setattr(frozen_store, "disk_cache", lambda: cache)
    order = FrozenOrder()
    first = _frozen(torch.randn(64, 64), tmp_path, tier="disk", layer=FrozenLayer(order))
    stack = _frozen(torch.randn(8, 64, 64), tmp_path, tier="disk", layer=FrozenLayer(order))
    first.detach().numbers()
    stack.detach().some([6, 1])
    stack.detach().some([3])
    file = stack.detach().store._file
    cache.forget(file, 8)
    first.detach().numbers()
    assert sorted(file.last_call) == [1, 3, 6]


def test_weights_larger_than_the_room_are_given_up_and_read_again(tmp_path, monkeypatch):
    cache = DiskCache(most_bytes=1 << 20)
    monkeypatch.setattr(frozen_store, "disk_cache", lambda: cache)
    monkeypatch.setattr("metier.memory.disk_cache.BATCH_BYTES", 0)
    order = FrozenOrder()
    plain = [torch.randn(256, 256) for _ in range(24)]
    weights = [_frozen(weight, tmp_path, tier="disk", layer=FrozenLayer(order)) for weight in plain]
    assert cache.num_bytes <= 1 << 20
    hidden = want = torch.randn(2, 256, requires_grad=True)
    got = hidden
    for weight, frozen_weight in zip(plain, weights, strict=True):
        want, got = F.linear(want, weight) / 16, F.linear(got, frozen_weight) / 16
        assert cache.num_bytes <= 3 * 256 * 1024 + (1 << 20)
    grads = [torch.autograd.grad(out.sum(), hidden)[0] for out in (want, got)]
    assert torch.equal(want, got)
    assert torch.equal(*grads)
    assert sum(weight.detach().store.meter.bytes_from_disk for weight in weights) > 20 * 256 * 1024
