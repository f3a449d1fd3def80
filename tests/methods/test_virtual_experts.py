"""Virtual experts against plain loops: outputs and every gradient, on awkward sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from methods.reference import reference_experts
from metier.methods.virtual_experts import Activation, ExpertBank, virtual_experts

HIDDEN, INNER, EXPERTS, TOP_K = 24, 10, 7, 3

# float64 on both sides: what is left is the order of summation
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
# bf16 has 8 bits of mantissa; the loop rounds at other places
BF16_TOLERANCE = {"rtol": 4e-2, "atol": 4e-2}


def gated(up_PU: Tensor) -> Tensor:
    gate, up = up_PU.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved(up_PU: Tensor) -> Tensor:
    gate, up = up_PU[..., ::2].clamp(max=0.7), up_PU[..., 1::2]
    return (up + 1) * gate * torch.sigmoid(gate * 1.7)


def normed(out_PD: Tensor) -> Tensor:
    """As some families treat every expert's output."""
    return out_PD * torch.rsqrt(out_PD.square().mean(-1, keepdim=True) + 0.1)


def make_bank(num: int, *, width: int, transposed: bool, bias: bool, dtype: torch.dtype, grad: bool) -> ExpertBank:
    up, down = torch.randn(num, width, HIDDEN, dtype=dtype) / 3, torch.randn(num, HIDDEN, INNER, dtype=dtype) / 3
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    up_bias = torch.randn(num, width, dtype=dtype) if bias else None
    down_bias = torch.randn(num, HIDDEN, dtype=dtype) if bias else None
    for tensor in (up, down, up_bias, down_bias):
        if tensor is not None:
            tensor.requires_grad_(grad)
    return ExpertBank(up, down, up_bias, down_bias)


def make_ids(num_tokens: int, num_virtual: int, pattern: str) -> Tensor:
    if pattern == "all on one":
        return torch.full((num_tokens, TOP_K), num_virtual - 1)
    ids = torch.stack([torch.randperm(num_virtual)[:TOP_K] for _ in range(num_tokens)])
    return ids.clamp(min=2) if pattern == "experts 0 and 1 empty" else ids


LAYOUTS = {
    "gated": {"activation": gated, "width": 2 * INNER, "transposed": False, "bias": False},
    "gated, transposed, with biases": {"activation": interleaved, "width": 2 * INNER, "transposed": True, "bias": True},
    "not gated": {"activation": F.gelu, "width": INNER, "transposed": False, "bias": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [1, 63, 257])
@pytest.mark.parametrize("pattern", ["random", "all on one", "experts 0 and 1 empty"])
@pytest.mark.parametrize("output_norm", [None, normed])
def test_outputs_and_gradients_equal_plain_loops(
    layout: str, num_tokens: int, pattern: str, output_norm: Activation | None
) -> None:
    torch.manual_seed(num_tokens)
    options = dict(LAYOUTS[layout])
    activation = options.pop("activation")
    base = make_bank(EXPERTS, dtype=torch.float64, grad=False, **options)
    deltas = tuple(make_bank(n, dtype=torch.float64, grad=True, **options) for n in (2, 1))
    hidden = torch.randn(num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, TOP_K, dtype=torch.float64, requires_grad=True)
    ids = make_ids(num_tokens, EXPERTS + 3, pattern)
    inputs = [hidden, weights, *(t for delta in deltas for t in delta.tensors() if t is not None)]

    fast = virtual_experts(
        hidden,
        ids,
        ids,
        weights,
        base=base,
        deltas=deltas,
        activation=activation,
        is_transposed=options["transposed"],
        output_norm=output_norm,
    )
    slow = reference_experts(hidden, ids, weights, [base, *deltas], activation, options["transposed"], output_norm)
    torch.testing.assert_close(fast, slow, **TOLERANCE)
    upstream = torch.randn_like(slow)
    slow_grads = torch.autograd.grad(slow, inputs, upstream, allow_unused=True)
    for mine, wanted, tensor in zip(torch.autograd.grad(fast, inputs, upstream), slow_grads, inputs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(tensor) if wanted is None else wanted, **TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 63, 257])
def test_bf16_base_with_float32_masters_equals_loops_and_keeps_float32_gradients(num_tokens: int) -> None:
    torch.manual_seed(0)
    options = {"width": 2 * INNER, "transposed": False, "bias": False}
    base = make_bank(EXPERTS, dtype=torch.bfloat16, grad=False, **options)
    delta = make_bank(2, dtype=torch.float32, grad=True, **options)
    hidden = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(num_tokens, TOP_K, requires_grad=True)
    ids = make_ids(num_tokens, EXPERTS + 2, "random")
    inputs = [hidden, weights, delta.up, delta.down]

    fast = virtual_experts(hidden, ids, ids, weights, base=base, deltas=(delta,), activation=gated, is_transposed=False)
    widened = [bank.to(torch.float32) for bank in (base, delta)]
    for tensor in (widened[1].up, widened[1].down):
        tensor.requires_grad_()
    wide_hidden = hidden.detach().float().requires_grad_()
    slow = reference_experts(wide_hidden, ids, weights, widened, gated, False)
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast.float(), slow, **BF16_TOLERANCE)
    grads = torch.autograd.grad(fast.float().sum(), inputs)
    wanted = torch.autograd.grad(
        slow.sum(), [wide_hidden, weights, widened[1].up, widened[1].down], materialize_grads=True
    )
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for mine, theirs in zip(grads, wanted, strict=True):
        scale = theirs.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(mine.float() / scale, theirs / scale, **BF16_TOLERANCE)


def test_base_bank_keeps_nothing_but_the_up_projection_and_forms_no_gradient() -> None:
    torch.manual_seed(0)
    base = make_bank(EXPERTS, width=2 * INNER, transposed=False, bias=False, dtype=torch.float32, grad=False)
    hidden = torch.randn(40, HIDDEN, requires_grad=True)
    weights = torch.rand(40, TOP_K)
    ids = make_ids(40, EXPERTS, "random")
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = virtual_experts(hidden, ids, ids, weights, base=base, deltas=(), activation=gated, is_transposed=False)
    assert sorted(kept) == sorted([(40, TOP_K), (40 * TOP_K, 2 * INNER)])
    out.sum().backward()
    assert base.up.grad is None
    assert base.down.grad is None
