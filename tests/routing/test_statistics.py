"""Concentration and overlap."""

from __future__ import annotations

import pytest
import torch

from metier.errors import SelectionError
from metier.routing.selection import ExpertSelection
from metier.routing.statistics import overlap, shared_top_k, top_share


def test_top_share_is_the_share_of_the_highest() -> None:
    scores_LE = torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert top_share(scores_LE, 1).tolist() == pytest.approx([0.6, 0.25])
    assert top_share(scores_LE, 2).tolist() == pytest.approx([0.9, 0.5])
    assert top_share(scores_LE * 7, 4).tolist() == pytest.approx([1, 1])


def test_shared_top_k_counts_common_experts_by_layer() -> None:
    first_LE = torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1]])
    second_LE = torch.tensor([[4.0, 1, 3, 2], [1, 2, 3, 4]])
    assert shared_top_k(first_LE, second_LE, 2).tolist() == [1, 0]
    assert shared_top_k(first_LE, first_LE, 3).tolist() == [3, 3]


def test_ties_in_the_top_k_break_by_expert_id() -> None:
    flat_LE = torch.ones(1, 40)
    leading_LE = flat_LE.clone()
    leading_LE[0, :6] = 2
    assert shared_top_k(flat_LE, leading_LE, 6).tolist() == [6]


def test_overlap_of_selections_is_a_mean_over_the_layers_of_either() -> None:
    first = ExpertSelection(experts={1: (1, 2, 3), 2: (4,)})
    second = ExpertSelection(experts={1: (2, 3, 4), 3: (4,)})
    found = overlap(first, second)
    assert found.num_shared_experts == pytest.approx(2 / 3)
    assert found.jaccard == pytest.approx((2 / 4) / 3)
    assert overlap(first, first).jaccard == 1


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_out_of_range_is_an_error(k: int) -> None:
    with pytest.raises(SelectionError, match=f"k: got {k}, expected 1 to num_experts=4"):
        top_share(torch.ones(2, 4), k)


def test_scores_of_two_models_are_an_error() -> None:
    with pytest.raises(SelectionError, match=r"scores: got \(2, 4\) and \(2, 8\), expected the same layers"):
        shared_top_k(torch.ones(2, 4), torch.ones(2, 8), 2)


def test_selections_without_routed_experts_have_no_overlap() -> None:
    nothing = ExpertSelection(experts={}, shared_experts=True)
    with pytest.raises(SelectionError, match="neither selection names a routed expert"):
        overlap(nothing, nothing)
