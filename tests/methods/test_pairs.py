"""The order of token-expert pairs, and the ways there and back, against indexing."""

from __future__ import annotations

import pytest
import torch

from metier.methods.pairs import PairOrder, order_pairs

K, D = 8, 65


def made(num_tokens: int, block: int) -> PairOrder:
    ids = torch.stack([torch.randperm(12)[:K] for _ in range(num_tokens)]) if num_tokens else torch.empty(0, K).long()
    return order_pairs(ids, ids, num_virtual=12, block=block)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("block", [1, 32])
def test_there_and_back_again(num_tokens: int, block: int) -> None:
    torch.manual_seed(0)
    order, values = made(num_tokens, block), torch.randn(num_tokens, K, D)
    rows = order.spread(values)
    assert rows.shape == (order.bounds[-1], D)
    assert torch.equal(order.by_token(rows), values)
    filling = order.pair_P == num_tokens * K
    assert not rows[filling].any()
    assert torch.equal(order.by_token(order.spread(values[..., 0])), values[..., 0])


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sums_over_slots_round_once(num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    order = made(num_tokens, 32)
    rows = torch.randn(order.bounds[-1], D).to(dtype)
    exact = rows.double()[order.row_TK].sum(1)
    got = order.summed(rows)
    assert (got.shape, got.dtype) == ((num_tokens, D), dtype)
    if dtype.itemsize == 2:  # sums of eight are exact enough in float32 to be rounded as the true ones are
        assert torch.equal(got, rows[order.row_TK].float().sum(1).to(dtype))
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_halves_are_rounded_to_even_in_bfloat16() -> None:
    order = order_pairs(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), num_virtual=2, block=1)
    # 1 + 2^-8 lies between 1 and 1 + 2^-7, and up is always the same side
    rows = torch.tensor([[1.0], [2**-8]], dtype=torch.bfloat16).expand(2, 64).contiguous()
    assert (order.summed(rows) == 1).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 300])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_sums_are_those_of_transformers_to_the_bit(
    num_tokens: int, weights_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    order = made(num_tokens, 32)
    rows, weights = torch.randn(order.bounds[-1], D).to(dtype), torch.rand(num_tokens, K).to(weights_dtype)
    before, out = rows.clone(), torch.empty(num_tokens, D, dtype=dtype)
    order.weighted(rows, weights, out)
    wanted = (rows[order.row_TK] * weights.unsqueeze(-1)).sum(1).to(dtype)
    assert torch.equal(out, wanted)
    assert torch.equal(rows, before)
