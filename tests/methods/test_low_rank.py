"""Low-rank changes against plain loops over experts whose changed weights are formed: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from methods.reference import reference_experts
from metier.methods import low_rank
from metier.methods.low_rank import LowRankBank, low_rank_experts
from metier.methods.virtual_experts import Activation, ExpertBank

HIDDEN, INNER, EXPERTS, TOP_K, RANK = 24, 10, 7, 3, 2

# float64 on both sides: what is left is the order of summation
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
# bf16 has 8 bits of mantissa; the loop rounds at other places
BF16_TOLERANCE = {"rtol": 4e-2, "atol": 4e-2}


def gated(up_PU: Tensor) -> Tensor:
    gate, up = up_PU.chunk(2, dim=-1)
    return F.silu(gate) * up


def normed(out_PD: Tensor) -> Tensor:
    """As some families treat every expert's output."""
    return out_PD * torch.rsqrt(out_PD.square().mean(-1, keepdim=True) + 0.1)


LAYOUTS = {
    "gated": (gated, 2 * INNER, False, False),
    "gated, transposed, with biases": (gated, 2 * INNER, True, True),
    "not gated": (F.gelu, INNER, False, True),
}


def make_base(width: int, transposed: bool, bias: bool, dtype: torch.dtype) -> ExpertBank:
    up, down = torch.randn(EXPERTS, width, HIDDEN) / 3, torch.randn(EXPERTS, HIDDEN, INNER) / 3
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    biases = (torch.randn(EXPERTS, width), torch.randn(EXPERTS, HIDDEN)) if bias else ()
    return ExpertBank(*(tensor.to(dtype) for tensor in (up, down, *biases)))


def make_bank(ids: tuple[int, ...], width: int, dtype: torch.dtype = torch.float64) -> LowRankBank:
    shapes = ((RANK, HIDDEN), (width, RANK), (RANK, INNER), (HIDDEN, RANK))
    tensors = (torch.randn(len(ids), *shape, dtype=dtype).requires_grad_() for shape in shapes)
    return LowRankBank(ids, tuple(0.5 + number for number in range(len(ids))), *tensors)


def formed(base: ExpertBank, bank: LowRankBank, transposed: bool) -> ExpertBank:
    """A bank of the changed experts with their changed weights, for the loop."""
    ids, scales = list(bank.expert_ids), torch.tensor(bank.scales, dtype=bank.up_a.dtype).view(-1, 1, 1)
    up, down = scales * (bank.up_b @ bank.up_a), scales * (bank.down_b @ bank.down_a)
    up, down = (up.mT, down.mT) if transposed else (up, down)
    biases = (None if bias is None else bias[ids] for bias in (base.up_bias, base.down_bias))
    return ExpertBank(base.up[ids] + up, base.down[ids] + down, *biases)


def virtual_ids(expert_ids_TK: Tensor, bank_ids_T: Tensor, banks: list[LowRankBank]) -> Tensor:
    """Where the loop finds each pair's expert: the base's rows, then each bank's."""
    ids = expert_ids_TK.clone()
    for token, number in enumerate(bank_ids_T.tolist()):
        for slot, expert in enumerate(expert_ids_TK[token].tolist()):
            if number < len(banks) and expert in banks[number].expert_ids:
                before = sum(len(bank.expert_ids) for bank in banks[:number])
                ids[token, slot] = EXPERTS + before + banks[number].expert_ids.index(expert)
    return ids


def make_ids(num_tokens: int, pattern: str) -> Tensor:
    if pattern == "all on one":
        return torch.full((num_tokens, TOP_K), 4)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    return ids.clamp(min=2) if pattern == "experts 0 and 1 empty" else ids


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [1, 63, 257])
@pytest.mark.parametrize("pattern", ["random", "all on one", "experts 0 and 1 empty"])
@pytest.mark.parametrize("output_norm", [None, normed])
def test_outputs_and_gradients_equal_loops_over_formed_weights(
    layout: str, num_tokens: int, pattern: str, output_norm: Activation | None
) -> None:
    torch.manual_seed(num_tokens)
    activation, width, transposed, bias = LAYOUTS[layout]
    base = make_base(width, transposed, bias, torch.float64)
    banks = [make_bank((1, 4), width), make_bank((0, 4, 6), width)]
    hidden = torch.randn(num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, TOP_K, dtype=torch.float64, requires_grad=True)
    ids, bank_ids = make_ids(num_tokens, pattern), torch.randint(3, (num_tokens,))
    inputs = [hidden, weights, *(tensor for bank in banks for tensor in bank.tensors())]

    fast = low_rank_experts(
        hidden,
        ids,
        bank_ids,
        weights,
        base=base,
        banks=tuple(banks),
        activation=activation,
        is_transposed=transposed,
        output_norm=output_norm,
    )
    rows = [base, *(formed(base, bank, transposed) for bank in banks)]
    virtual = virtual_ids(ids, bank_ids, banks)
    slow = reference_experts(hidden, virtual, weights, rows, activation, transposed, output_norm)
    torch.testing.assert_close(fast, slow, **TOLERANCE)
    upstream = torch.randn_like(slow)
    slow_grads = torch.autograd.grad(slow, inputs, upstream, materialize_grads=True)
    for mine, wanted in zip(torch.autograd.grad(fast, inputs, upstream), slow_grads, strict=True):
        torch.testing.assert_close(mine, wanted, **TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 63, 257])
def test_a_bf16_base_with_float32_matrices_equals_loops_and_keeps_float32_gradients(num_tokens: int) -> None:
    torch.manual_seed(0)
    base, bank = make_base(2 * INNER, False, False, torch.bfloat16), make_bank((1, 4), 2 * INNER, torch.float32)
    hidden = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(num_tokens, TOP_K, requires_grad=True)
    ids, bank_ids = make_ids(num_tokens, "random"), torch.zeros(num_tokens, dtype=torch.int64)
    fast = low_rank_experts(
        hidden, ids, bank_ids, weights, base=base, banks=(bank,), activation=gated, is_transposed=False
    )
    assert fast.dtype == torch.bfloat16
    wide, wide_hidden = base.to(torch.float32), hidden.detach().float().requires_grad_()
    slow = reference_experts(
        wide_hidden, virtual_ids(ids, bank_ids, [bank]), weights, [wide, formed(wide, bank, False)], gated, False
    )
    scale = slow.detach().abs().max()
    torch.testing.assert_close(fast.float() / scale, slow / scale, **BF16_TOLERANCE)
    grads = torch.autograd.grad(fast.float().sum(), [hidden, weights, *bank.tensors()])
    assert [grad.dtype for grad in grads] == [torch.bfloat16] + [torch.float32] * 5
    wanted = torch.autograd.grad(slow.sum(), [wide_hidden, weights, *bank.tensors()], materialize_grads=True)
    for mine, theirs in zip(grads, wanted, strict=True):
        scale = theirs.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(mine.float() / scale, theirs / scale, **BF16_TOLERANCE)


def test_dropout_drops_inputs_of_the_changes_alone_and_the_backward_pass_drops_the_same() -> None:
    base = make_base(2 * INNER, False, False, torch.float64)
    bank = make_bank((1, 4), 2 * INNER)
    weights, ids = torch.rand(40, TOP_K, dtype=torch.float64), make_ids(40, "random")
    hidden = torch.randn(40, HIDDEN, dtype=torch.float64, requires_grad=True)

    def run(bank_id: int, dropout: float, *inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        own = LowRankBank(bank.expert_ids, bank.scales, *inputs[1:])
        return low_rank_experts(
            inputs[0],
            ids,
            torch.full((40,), bank_id),
            weights,
            base=base,
            banks=(own,),
            activation=gated,
            is_transposed=False,
            dropout=dropout,
        )

    inputs = (hidden, *bank.tensors())
    assert torch.equal(run(1, 0.4, *inputs), run(1, 0.0, *inputs))
    assert torch.equal(run(0, 0.4, *inputs), run(0, 0.4, *inputs))
    assert not torch.allclose(run(0, 0.4, *inputs), run(0, 0.0, *inputs))
    # numerical derivatives: another mask in the backward pass would give other gradients
    assert torch.autograd.gradcheck(lambda *args: run(0, 0.4, *args), inputs, fast_mode=True)


def test_dropout_keeps_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(INNER, False, False, torch.float64)
    bank = make_bank(tuple(range(EXPERTS)), INNER)
    hidden, weights = torch.randn(1, HIDDEN, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    # a linear activation: then the mean over masks is what there is without dropout
    options = {"base": base, "banks": (bank,), "activation": lambda up: up * 1.0, "is_transposed": False}
    ids, bank_ids = torch.zeros(4000, 1, dtype=torch.int64), torch.zeros(4000, dtype=torch.int64)
    many = low_rank_experts(hidden.expand(4000, -1), ids, bank_ids, weights.expand(4000, -1), dropout=0.3, **options)
    plain = low_rank_experts(hidden, ids[:1], bank_ids[:1], weights, **options)[0]
    deviation = many.std(0) / 4000**0.5
    assert ((many.mean(0) - plain).abs() < 5 * deviation).all()


def test_only_rows_of_changed_experts_are_kept_where_nothing_below_is_trained() -> None:
    torch.manual_seed(0)
    base, bank = make_base(2 * INNER, False, False, torch.float64), make_bank((1, 4), 2 * INNER)
    hidden, weights = torch.randn(40, HIDDEN, dtype=torch.float64), torch.rand(40, TOP_K, dtype=torch.float64)
    ids = make_ids(40, "random")
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low_rank_experts(
            hidden,
            ids,
            torch.zeros(40, dtype=torch.int64),
            weights,
            base=base,
            banks=(bank,),
            activation=gated,
            is_transposed=False,
        )
    num_changed = int(torch.isin(ids, torch.tensor([1, 4])).sum())
    matrices = [tuple(tensor.shape) for tensor in bank.tensors()]
    assert sorted(kept) == sorted([(40, HIDDEN), (40, TOP_K), (num_changed, 2 * INNER), *matrices])


def test_no_product_is_as_large_as_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """`B A` and `W + B A` are never formed: every matrix product has a side of as many rows as there are pairs."""
    sizes: list[tuple[int, ...]] = []
    plain = torch.Tensor.__matmul__

    def recorded(left: Tensor, right: Tensor) -> Tensor:
        sizes.append((*left.shape, *right.shape))
        return plain(left, right)

    monkeypatch.setattr(low_rank.Tensor, "__matmul__", recorded)
    base, bank = make_base(2 * INNER, False, False, torch.float64), make_bank((4,), 2 * INNER)
    hidden = torch.randn(63, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights, ids = torch.rand(63, 1, dtype=torch.float64), torch.full((63, 1), 4)
    out = low_rank_experts(
        hidden,
        ids,
        torch.zeros(63, dtype=torch.int64),
        weights,
        base=base,
        banks=(bank,),
        activation=gated,
        is_transposed=False,
    )
    out.sum().backward()
    assert sizes
    assert all(63 in size for size in sizes), sizes


def test_the_masks_of_the_two_projections_are_not_the_same() -> None:
    """Where both have as many inputs, one seed for both would drop the same places."""
    torch.manual_seed(0)
    drops: dict[str, Tensor] = {}
    plain = low_rank.LowRankRows._dropped

    def recorded(self: low_rank.LowRankRows, part: object, values: Tensor, projection: str) -> Tensor:
        dropped = plain(self, part, values, projection)  # type: ignore[arg-type]
        drops.setdefault(projection, dropped == 0)
        return dropped

    bank = LowRankBank((2,), (1.0,), *(torch.randn(1, *s) for s in ((RANK, 8), (8, RANK), (RANK, 8), (8, RANK))))
    base = ExpertBank(torch.randn(EXPERTS, 8, 8), torch.randn(EXPERTS, 8, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank.LowRankRows, "_dropped", recorded)
        low_rank_experts(
            torch.randn(50, 8),
            torch.full((50, 1), 2),
            torch.zeros(50, dtype=torch.int64),
            torch.ones(50, 1),
            base=base,
            banks=(bank,),
            activation=F.gelu,
            is_transposed=False,
            dropout=0.5,
        )
    assert drops["up"].shape == drops["down"].shape
    # two independent masks agree in half of the 400 places, give or take 5 deviations
    assert 150 < (drops["up"] == drops["down"]).sum() < 250
