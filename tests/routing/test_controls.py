"""Selections to compare with: random experts and the coldest ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import SelectionError
from metier.routing.profile import RoutingProfile
from metier.routing.selection import ExpertSelection, coldest_selection, random_selection

COUNTS_LE = [[5, 0, 3, 2], [1, 1, 8, 0]]


def made_profile(counts_LE: list[list[int]] = COUNTS_LE) -> RoutingProfile:
    counts_HLE = torch.tensor([counts_LE, counts_LE])
    return RoutingProfile(
        layer_ids=(1, 4),
        num_experts=len(counts_LE[0]),
        top_k=1,
        token_counts_HLE=counts_HLE,
        gate_mass_HLE=10.0 - counts_HLE.double(),
        num_tokens_H=(10, 10),
    )


def test_a_random_selection_has_the_same_counts_and_other_experts() -> None:
    like = ExpertSelection(experts={4: (0, 1, 2), 1: (0, 1), 2: (0,)}, shared_experts=True)
    drawn = random_selection(like, num_experts=64, seed=0)
    assert {layer: len(ids) for layer, ids in drawn.experts.items()} == {4: 3, 1: 2, 2: 1}
    assert drawn.shared_experts
    assert drawn.num_experts == 64
    assert drawn.experts != like.experts
    assert random_selection(like, num_experts=64, seed=0) == drawn
    assert random_selection(like, num_experts=64, seed=1) != drawn
    reordered = ExpertSelection(experts={1: (0, 1), 2: (0,), 4: (0, 1, 2)}, shared_experts=True)
    assert random_selection(reordered, num_experts=64, seed=0) == drawn


def test_a_random_selection_from_too_few_experts_is_an_error() -> None:
    with pytest.raises(SelectionError, match="got 3 experts to pick, but there are only num_experts=2"):
        random_selection(ExpertSelection(experts={4: (0, 1, 2)}), num_experts=2, seed=0)


def test_the_coldest_selection_has_the_lowest_scores_first_and_ties_by_id() -> None:
    like = ExpertSelection(experts={4: (2, 0, 1), 1: (0,)}, shared_experts=True)
    coldest = coldest_selection(like, made_profile(), score="token")
    assert list(coldest.experts.items()) == [(1, (1,)), (4, (3, 0, 1))]
    assert (coldest.shared_experts, coldest.non_expert_modules, coldest.num_experts) == (True, False, 4)


def test_the_coldest_selection_uses_the_score_that_is_asked_for() -> None:
    like = ExpertSelection(experts={1: (0, 1)})
    assert coldest_selection(like, made_profile(), score="gate").experts == {1: (0, 2)}


@given(
    counts=st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(any),
    num_picked=st.integers(1, 6),
)
def test_no_expert_left_out_is_colder(counts: list[int], num_picked: int) -> None:
    like = ExpertSelection(experts={4: tuple(range(num_picked))})
    cold = coldest_selection(like, made_profile([counts, counts]), score="token").experts[4]
    assert len(cold) == len(set(cold)) == num_picked
    rest = [counts[expert] for expert in range(6) if expert not in cold]
    assert max(counts[expert] for expert in cold) <= min(rest, default=20)


def test_a_layer_that_was_not_profiled_has_no_coldest_experts() -> None:
    with pytest.raises(SelectionError, match=r"layers\.2: the selection names experts there, but the profile has the"):
        coldest_selection(ExpertSelection(experts={2: (0,)}), made_profile(), score="token")


def test_more_coldest_experts_than_there_are_is_an_error() -> None:
    with pytest.raises(SelectionError, match="num_picked: got 5, but there are only num_experts=4"):
        coldest_selection(ExpertSelection(experts={1: (0, 1, 2, 3, 4)}), made_profile(), score="token")
