"""A parameter whose numbers live in a store behaves as the plain tensor does, and reads no more than is needed."""

from __future__ import annotations

import copy
import os
import pickle
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
        lambda w: w[1:4][:, 1].T,
        lambda w: w[:, 1:3][2],
        lambda w: w.view(-1)[7:].double(),
        lambda w: w.view(torch.int32),
        lambda w: w.half().mT[:, ::2].float(),
        lambda w: w.expand(2, 5, 4, 6),
        lambda w: w.unsqueeze(0).squeeze(0)[3],
        lambda w: w.chunk(2, dim=1)[1],
        lambda w: w.unbind()[2],
        lambda w: w.diagonal(dim1=1, dim2=2).detach(),
        lambda w: w.split([1, 4])[1].mT,
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
    "view",
    [
        lambda w: w[1:3], lambda w: w[2], lambda w: w.mT, lambda w: w.detach(), lambda w: w * 2, lambda w: w.double().mT,
        lambda w: w.swapaxes(1, 2)[1:], lambda w: w[1].T, lambda w: w.view_as(w), lambda w: w.to(torch.half).float(),
    ],
)  # fmt: skip
def test_views_are_made_in_inference_mode_too(tmp_path, view, mode):
    stack = torch.randn(5, 4, 6)
    weight = _frozen(stack, tmp_path)
    with mode():
        got = view(weight)
        assert torch.equal(got.numbers() if isinstance(got, FrozenWeight) else got, view(stack))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("view", [lambda w: w.mT, lambda w: w.swapaxes(1, 2), lambda w: w.float().mT[1:]])
def test_of_transposed_stacks_only_what_is_asked_for_is_read_in_any_mode(tmp_path, reads, view, mode):
    stack = torch.randn(5, 4, 6)
    with mode():
        some = view(_frozen(stack, tmp_path)).some([2, 0])
        assert torch.equal(torch.stack(some), view(stack)[torch.tensor([2, 0])])
    assert len(reads) == 1
    assert len(reads[0]) == 2


def test_experts_by_their_ids_are_all_that_is_read(tmp_path, reads):
    weight = _frozen(torch.randn(6, 4, 8), tmp_path)
    weight.detach()[torch.tensor([5, 2])].float()
    assert reads == [[5, 2]]


def test_a_view_that_is_no_expert_reads_nothing_before_it_is_used(tmp_path, reads):
    weight = _frozen(torch.randn(6, 4, 8), tmp_path)
    view = weight[1:3].reshape(-1)
    assert reads == []
    view.sum()
    assert reads == [[1, 2]]


@pytest.mark.parametrize(
    "look",
    [lambda w: w.select(0, 3), lambda w: w.select(0, -4), lambda w: w[torch.tensor([0, 3])], lambda w: w[[-4]]],
)
def test_an_expert_that_is_not_there_raises(tmp_path, look):
    stack = torch.randn(3, 4, 8)
    with pytest.raises(IndexError):
        look(stack)
    with pytest.raises(IndexError):
        look(_frozen(stack, tmp_path))


def test_every_conversion_rounds(tmp_path):
    numbers = torch.randn(4, 8)
    module = nn.Linear(8, 4, bias=False)
    module.weight = _frozen(numbers, tmp_path)
    assert torch.equal(module.weight.half().float() + 0, numbers.half().float())
    module.half().float()
    assert torch.equal(module.weight + 0, numbers.half().float())
    assert not torch.equal(numbers.half().float(), numbers)


def test_on_the_meta_device_there_are_no_numbers_and_the_store_keeps_its_own(tmp_path):
    numbers = torch.randn(3, 4, 8)
    weight = _frozen(numbers, tmp_path, tier="device")
    empty = weight.to("meta")
    assert ((empty + 1).device.type, empty.mT.some([1])[0].shape) == ("meta", (8, 4))
    assert torch.equal(weight + 0, numbers)


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


ONE = torch.tensor(1.0)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.zeros(3, 4, 8)),
        lambda w: w.__setitem__(torch.tensor([1]), 0.0),
        lambda w: w[1].mul_(2),
        lambda w: w.data.add_(1),
        lambda w: setattr(w, "data", torch.zeros(3, 4, 8)),
        lambda w: setattr(w, "data", w.data[:1]),
        lambda w: w.__iadd__(1),
        lambda w: w.view(-1).zero_(),
        lambda w: w.reshape(-1)[3:5].fill_(1),
        lambda w: w[:, 1].zero_(),
        lambda w: w.permute(2, 0, 1).sub_(1),
        lambda w: w.chunk(2, dim=2)[1].neg_(),
        lambda w: w.diagonal().fill_(0),
        lambda w: w.set_(torch.zeros(3, 4, 8)),
        lambda w: w.resize_(2),
        lambda w: w.index_add_(0, torch.tensor([1]), torch.ones(1, 4, 8)),
        lambda w: torch.add(torch.ones(3, 4, 8), 1, out=w),
        lambda w: torch._foreach_add_([torch.ones(2), w], 1.0),
        lambda w: torch._foreach_mul_([w.detach()], [torch.ones(3, 4, 8)]),
        lambda w: torch._fused_adamw_(
            [w.detach()], *([torch.ones(3, 4, 8)] for _ in range(3)), [], [ONE],
            lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        ),
        lambda w: nn.init.normal_(w),
        lambda w: nn.utils.vector_to_parameters(torch.zeros(96), [w]),
    ],
)  # fmt: skip
def test_nobody_can_write_into_it(tmp_path, write, tier):
    stack = torch.randn(3, 4, 8)
    weight = _frozen(stack, tmp_path, tier=tier)
    with torch.no_grad(), pytest.raises(ModelError, match=rf"w: is frozen in a store \({tier}\) and cannot be written"):
        write(weight)
    assert torch.equal(weight.detach().numbers(), stack)


@pytest.mark.parametrize(
    "share",
    [
        lambda w: torch.empty(0).set_(w.detach()),
        lambda w: torch.from_dlpack(w),
        lambda w: w.detach().clone(),
        lambda w: w.contiguous().to(torch.float32, copy=True) + 0,
        lambda w: copy.deepcopy(w),
        lambda w: copy.copy(w),
    ],
)
def test_what_would_share_its_memory_is_a_copy(tmp_path, share):
    stack = torch.randn(3, 4, 8)
    weight = _frozen(stack, tmp_path)
    with torch.no_grad():
        shared = share(weight)
        assert torch.equal(shared, stack)
        if not isinstance(shared, FrozenWeight):
            shared.zero_()
    assert torch.equal(weight.detach().numbers(), stack)


def test_what_is_written_elsewhere_from_it_is_written(tmp_path):
    numbers, out = torch.randn(4, 8), torch.empty(2, 4)
    with torch.no_grad():
        torch.mm(torch.ones(2, 8), _frozen(numbers, tmp_path).T, out=out)
    assert torch.equal(out, torch.ones(2, 8) @ numbers.T)
    assert torch.equal(torch.zeros(4, 8).copy_(_frozen(numbers, tmp_path).detach()), numbers)


@pytest.mark.parametrize(
    "train",
    [lambda w: w.requires_grad_(), lambda w: setattr(w, "requires_grad", True), lambda w: nn.Parameter(w.detach())],
)
def test_it_cannot_be_trained(tmp_path, train):
    weight = _frozen(torch.randn(4, 8), tmp_path)
    with pytest.raises(ModelError, match=r"w: is frozen in a store \(host\) and cannot be trained"):
        train(weight)
    weight.requires_grad_(False)
    weight.requires_grad = False
    assert not F.linear(torch.ones(8), weight).requires_grad


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_saved_and_loaded_it_is_an_ordinary_parameter(tmp_path, tier):
    stack = torch.randn(3, 4, 8)
    weight = _frozen(stack, tmp_path, tier=tier)
    torch.save({"w": weight}, tmp_path / "saved.pt")
    for loaded in (torch.load(tmp_path / "saved.pt", weights_only=True)["w"], pickle.loads(pickle.dumps(weight))):
        assert type(loaded) is nn.Parameter
        assert torch.equal(loaded, stack)


@pytest.mark.parametrize("share", [lambda m: m.share_memory(), lambda m: m.weight.untyped_storage()])
def test_its_memory_cannot_be_asked_for(tmp_path, share):
    module = nn.Linear(8, 4, bias=False)
    module.weight = _frozen(torch.randn(4, 8), tmp_path)
    with pytest.raises(ModelError, match=r"w: is frozen in a store \(host\) and has no memory that could be"):
        share(module)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_compiled_model_gives_the_same(tmp_path, tier):
    torch.compiler.reset()
    numbers = torch.randn(2, 8, 8)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    for module, weight in zip((model[0], model[2]), numbers, strict=True):
        module.weight = _frozen(weight, tmp_path, tier=tier)
    inputs = torch.randn(3, 8, requires_grad=True)
    outs = [run(inputs) for run in (model, torch.compile(model, backend="aot_eager"))]
    grads = [torch.autograd.grad(out.square().sum(), inputs)[0] for out in outs]
    assert torch.equal(*outs)
    assert torch.equal(*grads)


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


def test_more_weights_than_files_may_be_open_at_first(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, hard))
    try:
        weights = [_frozen(torch.full((32, 64), float(i)), tmp_path, tier="disk") for i in range(60)]
        assert [weight.detach().numbers()[0, 0].item() for weight in weights] == list(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
