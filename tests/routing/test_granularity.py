"""Coarse experts: which are grouped, and what a selection of groups trains."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import SelectionError
from metier.routing.granularity import coactivation_EE, group_experts, pick_groups
from metier.routing.policy import pick_experts


def test_coactivation_counts_tokens_that_chose_both() -> None:
    ids = torch.tensor([[0, 2], [0, 1], [2, 0], [3, 1]], dtype=torch.int8)
    assert coactivation_EE(ids, num_experts=5).tolist() == [
        [3, 1, 2, 0, 0],
        [1, 2, 0, 1, 0],
        [2, 0, 2, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0],
    ]


def test_coactivation_adds_up_over_many_tokens() -> None:
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(400)]).repeat(200, 1)
    whole = coactivation_EE(ids, num_experts=6)
    assert torch.equal(whole, 200 * coactivation_EE(ids[:400], num_experts=6))


def test_experts_of_like_company_are_grouped_whatever_their_ids() -> None:
    # 0, 3 and 5 go with 1; 2 and 4 go with 6 and 7
    pairs = [(0, 1), (3, 1), (5, 1), (2, 6), (4, 6), (2, 7), (4, 7), (0, 1), (6, 2)]
    counts = coactivation_EE(torch.tensor(pairs), num_experts=8)
    groups = group_experts(counts, group_size=2)
    assert (2, 4) in groups
    assert (6, 7) in groups
    assert any(set(group) <= {0, 3, 5} for group in groups)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32))
def test_every_expert_is_in_one_group_of_the_right_size(size: int, num_groups: int, seed: int) -> None:
    num_experts = size * num_groups
    top_k = min(3, num_experts)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(20)])
    groups = group_experts(coactivation_EE(ids, num_experts=num_experts), group_size=size)
    assert sorted(expert for group in groups for expert in group) == list(range(num_experts))
    assert all(len(group) == size and list(group) == sorted(group) for group in groups)
    assert groups == group_experts(coactivation_EE(ids, num_experts=num_experts), group_size=size)


@given(st.lists(st.floats(0.001, 1), min_size=6, max_size=6), st.floats(0.05, 1))
def test_groups_of_one_are_the_ordinary_selection_and_larger_ones_cover_as_much(raw: list[float], top_p: float) -> None:
    scores = [score / sum(raw) for score in raw]
    fine = pick_groups(scores, tuple((expert,) for expert in range(6)), top_p=top_p)
    assert fine == pick_experts(scores, top_p=top_p)
    coarse = pick_groups(scores, ((0, 4), (1, 2), (3, 5)), top_p=top_p)
    assert len(coarse) % 2 == 0
    assert sum(scores[expert] for expert in coarse) >= min(top_p, 1) - 1e-6
    assert len(coarse) >= len(fine)


def test_the_group_that_crosses_top_p_is_included_and_none_after_it() -> None:
    assert pick_groups([0.1, 0.4, 0.2, 0.3], ((0, 1), (2, 3)), top_p=0.5) == (0, 1)
    assert pick_groups([0.1, 0.4, 0.2, 0.3], ((0, 1), (2, 3)), top_p=0.51) == (0, 1, 2, 3)
    assert pick_groups([0.1, 0.3, 0.2, 0.4], ((0, 1), (2, 3)), top_p=0.5) == (2, 3)


def test_uneven_groups_and_experts_left_out_are_refused() -> None:
    with pytest.raises(SelectionError, match="group_size: got 3, expected a divisor of the 8 experts"):
        group_experts(torch.zeros(8, 8), group_size=3)
    with pytest.raises(SelectionError, match=r"groups: got experts \[0, 1, 1\], expected each of the 3"):
        pick_groups([0.5, 0.3, 0.2], ((0, 1), (1,)), top_p=0.5)
