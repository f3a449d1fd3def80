"""Counting against plain loops, on awkward sizes and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metier.routing.counter import RoutingCounter

# weights are rounded to multiples of 2^-26, so each slot may be off by half of that
STEP = 2.0**-26


def by_loops(expert_ids_TK: Tensor, weights_TK: Tensor, half_T: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    counts_HE = torch.zeros(2, num_experts, dtype=torch.int64)
    mass_HE = torch.zeros(2, num_experts, dtype=torch.float64)
    for token, half in enumerate(half_T.tolist()):
        for slot in range(expert_ids_TK.shape[1]):
            expert = int(expert_ids_TK[token, slot])
            if expert < num_experts:
                counts_HE[half, expert] += 1
                mass_HE[half, expert] += float(weights_TK[token, slot])
    return counts_HE, mass_HE


@pytest.mark.parametrize("num_tokens", [1, 63, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_what_plain_loops_count(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    counter = RoutingCounter(num_layers=2, num_experts=6)
    expected = []
    for layer in range(2):
        ids_TK = torch.rand(num_tokens, 6, generator=generator).argsort(dim=1)[:, :3]
        ids_TK[ids_TK == 4] = 5 + 4 * layer  # expert 4 sees no token; in layer 1 those slots reach no expert
        weights_TK = torch.rand(num_tokens, 3, generator=generator).to(dtype)
        half_T = torch.randint(2, (num_tokens,), generator=generator)
        counter.add(layer, ids_TK, weights_TK, half_T)
        expected.append(by_loops(ids_TK, weights_TK, half_T, 6))
    assert torch.equal(counter.token_counts_HLE(), torch.stack([counts for counts, _ in expected], dim=1))
    mass_HLE = torch.stack([mass for _, mass in expected], dim=1)
    torch.testing.assert_close(counter.gate_mass_HLE(), mass_HLE, rtol=0, atol=num_tokens * 3 * STEP / 2)


def test_all_tokens_on_one_expert() -> None:
    counter = RoutingCounter(num_layers=1, num_experts=4)
    counter.add(0, torch.full((9, 1), 2), torch.full((9, 1), 0.5), torch.zeros(9, dtype=torch.int64))
    assert counter.token_counts_HLE().tolist() == [[[0, 0, 9, 0]], [[0, 0, 0, 0]]]
    assert counter.gate_mass_HLE().tolist() == [[[0, 0, 4.5, 0]], [[0, 0, 0, 0]]]


def test_neither_order_nor_batching_changes_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.randint(5, (1000, 2), generator=generator)
    # a steep softmax: sums of weights of one magnitude would be exact without rounding
    weights_TK = (torch.randn(1000, 2, generator=generator) * 20).softmax(dim=1)
    half_T = torch.randint(2, (1000,), generator=generator)
    whole = RoutingCounter(num_layers=1, num_experts=5)
    whole.add(0, ids_TK, weights_TK, half_T)
    pieces = RoutingCounter(num_layers=1, num_experts=5)
    for part in torch.randperm(1000, generator=generator).split(37):
        pieces.add(0, ids_TK[part], weights_TK[part], half_T[part])
    assert torch.equal(whole.token_counts_HLE(), pieces.token_counts_HLE())
    assert torch.equal(whole.gate_mass_HLE(), pieces.gate_mass_HLE())


def test_small_integer_ids_do_not_overflow() -> None:
    counter = RoutingCounter(num_layers=1, num_experts=200)
    counter.add(0, torch.tensor([[99]], dtype=torch.int8), torch.ones(1, 1), torch.ones(1, dtype=torch.int64))
    assert counter.token_counts_HLE()[1, 0, 99] == 1


def test_nothing_counted_is_zeros() -> None:
    counter = RoutingCounter(num_layers=2, num_experts=3)
    assert counter.token_counts_HLE().shape == counter.gate_mass_HLE().shape == (2, 2, 3)
    assert not counter.token_counts_HLE().any()


def test_groups_are_counted_apart_and_even_ones_make_the_first_half() -> None:
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.randint(5, (200, 2), generator=generator)
    weights_TK, norms_TK = torch.rand(2, 200, 2, generator=generator)
    group_T = torch.randint(6, (200,), generator=generator)
    counter = RoutingCounter(num_layers=1, num_experts=4, num_groups=6, with_output_norms=True)
    counter.add(0, ids_TK, weights_TK, group_T, norms_TK)
    halves = RoutingCounter(num_layers=1, num_experts=4)
    halves.add(0, ids_TK, weights_TK, group_T % 2)
    assert torch.equal(counter.token_counts_HLE(), halves.token_counts_HLE())
    assert torch.equal(counter.gate_mass_HLE(), halves.gate_mass_HLE())
    norm_GLE = counter.output_norm_GLE()
    assert norm_GLE is not None
    for group in range(6):
        mine = group_T == group
        counts_HE, mass_HE = by_loops(ids_TK[mine], weights_TK[mine], torch.zeros(int(mine.sum())).long(), 4)
        _, norm_HE = by_loops(ids_TK[mine], norms_TK[mine], torch.zeros(int(mine.sum())).long(), 4)
        assert torch.equal(counter.token_counts_GLE()[group, 0], counts_HE[0])
        torch.testing.assert_close(counter.gate_mass_GLE()[group, 0], mass_HE[0], rtol=0, atol=400 * STEP / 2)
        torch.testing.assert_close(norm_GLE[group, 0], norm_HE[0], rtol=0, atol=400 * STEP / 2)


def test_norms_are_there_only_where_they_are_counted() -> None:
    assert RoutingCounter(num_layers=1, num_experts=3).output_norm_GLE() is None
    counter = RoutingCounter(num_layers=1, num_experts=3, with_output_norms=True)
    with pytest.raises(AssertionError, match="output norms are counted always or never"):
        counter.add(0, torch.zeros(1, 1).long(), torch.ones(1, 1), torch.zeros(1).long())
