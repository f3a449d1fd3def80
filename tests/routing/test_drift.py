"""Drift between two profiles, against distributions whose distance is known."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from made_profiles import counted_profile as profile
from metier.errors import SelectionError
from metier.routing.drift import drift, jensen_shannon, moved_share


def test_each_layer_says_how_much_of_its_score_moved_and_which_experts_did() -> None:
    before, after = profile([[50, 30, 20, 0], [25, 25, 25, 25]]), profile([[50, 10, 20, 20], [25, 25, 25, 25]])
    result = drift(before, after, top=2, num_moves=3)
    first, second = result.layers
    assert (first.layer, second.layer) == (1, 3)
    assert first.moved_share == pytest.approx(0.2)
    assert second.moved_share == second.divergence == 0
    assert (first.num_shared_top, second.num_shared_top) == (1, 2)
    assert [(move.layer, move.expert, round(move.change, 6)) for move in result.moves] == [
        (1, 1, -0.2), (1, 3, 0.2), (1, 0, 0.0)
    ]  # fmt: skip
    assert json.loads(json.dumps(result.to_dict()))["layers"][0]["layer"] == 1


def test_distributions_without_a_common_expert_are_one_bit_apart() -> None:
    one, other = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert moved_share(one, other).tolist() == [1.0]
    assert jensen_shannon(one, other).tolist() == [1.0]


def test_the_divergence_of_a_known_pair() -> None:
    one, other = torch.tensor([[0.75, 0.25]], dtype=torch.float64), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    # 1 - H(1/4), by JS = H(middle) - mean H
    assert jensen_shannon(one, other).item() == pytest.approx(0.18872187554086717)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9).filter(lambda x: sum(map(sum, x))))
def test_both_distances_are_symmetric_and_between_0_and_1(pairs: list[tuple[float, float]]) -> None:
    rows: Tensor = torch.tensor(pairs, dtype=torch.float64).T
    one, other = (row[None] / row.sum() if row.sum() > 0 else torch.full_like(row[None], 1 / len(row)) for row in rows)
    for distance in (moved_share, jensen_shannon):
        value = distance(one, other).item()
        assert -1e-12 <= value <= 1 + 1e-12
        assert value == pytest.approx(distance(other, one).item(), abs=1e-12)


def test_profiles_of_different_models_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"drift: got layers \[1, 3\] of 4 experts and \[1, 2\] of 4"):
        drift(profile([[1, 1, 1, 1]] * 2), profile([[1, 1, 1, 1]] * 2, layers=(1, 2)))
    with pytest.raises(SelectionError, match=r"of 4 experts and .* of 3, expected the same"):
        drift(profile([[1, 1, 1, 1]] * 2), profile([[1, 1, 1]] * 2))
