"""What an analysis says of profiles whose concentration, overlap and drift are known."""

from __future__ import annotations

import json

import pytest

from made_profiles import counted_profile as profile
from metier.errors import SelectionError
from metier.routing.analysis import analyse
from metier.routing.drift import drift
from metier.routing.routing_profile import RoutingProfile

LAW = profile([[50, 30, 20, 0], [40, 40, 10, 10]])
CODE = profile([[0, 50, 10, 40], [40, 40, 10, 10]])


def test_the_top_experts_share_is_by_rank_and_by_layer() -> None:
    facts = analyse({"law": LAW}).profiles["law"]
    assert set(facts.top_share) == {1, 2, 4}
    assert facts.top_share[1] == pytest.approx([0.5, 0.4])
    assert facts.top_share[2] == pytest.approx([0.8, 0.8])
    assert facts.top_share[4] == pytest.approx([1.0, 1.0])
    assert facts.num_tokens == LAW.num_tokens
    assert facts.reliability == 1.0


def test_how_many_experts_each_top_p_selects() -> None:
    sizes = analyse({"law": LAW}).profiles["law"].num_selected
    # layer 1 needs 1 expert for 0.5 and 2 for 0.7; layer 3 needs 2 for both
    assert sizes[0.1] == 1
    assert sizes[0.5] == 1.5
    assert sizes[0.7] == 2
    assert sizes[0.9] == 3


def test_shared_experts_are_counted_by_layer_beside_chance() -> None:
    (pair,) = analyse({"law": LAW, "code": CODE}).shared
    assert (pair.first, pair.second) == ("law", "code")
    assert pair.by_layer == [1, 2]
    assert pair.mean == 1.5
    assert pair.chance == 1.0  # 2 x 2 of 4
    (pair,) = analyse({"law": LAW, "code": CODE}, top=3).shared
    assert pair.by_layer == [2, 3]
    assert pair.chance == 2.25


def test_every_pair_of_profiles_is_compared_once() -> None:
    pairs = analyse({"a": LAW, "b": CODE, "c": LAW}).shared
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_drift_is_between_the_named_profiles_in_the_order_given() -> None:
    analysis = analyse({"law": LAW, "code": CODE}, drifts=[("code", "law")])
    assert analysis.drifts == {"code → law": drift(CODE, LAW, top=2)}
    assert analysis.drifts["code → law"].layers[0].moved_share == pytest.approx(0.6)


def test_all_of_it_goes_into_json() -> None:
    values = json.loads(json.dumps(analyse({"law": LAW, "code": CODE}, drifts=[("law", "code")]).to_dict()))
    assert values["profiles"]["law"]["top_share"]["2"] == pytest.approx([0.8, 0.8])
    assert values["shared"][0]["by_layer"] == [1, 2]
    assert values["drifts"]["law → code"]["layers"][0]["layer"] == 1


def test_no_profile_is_refused() -> None:
    with pytest.raises(SelectionError, match="got no profile, expected at least one"):
        analyse({})


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (profile([[2, 2, 2, 2]] * 2, layers=(1, 2)), "layers 1, 2 of 4 experts"),
        (profile([[2, 2, 2, 2, 2]] * 2), "layers 1, 3 of 5 experts"),
    ],
)
def test_profiles_of_other_models_are_refused(other: RoutingProfile, got: str) -> None:
    with pytest.raises(SelectionError, match=f"'other' has {got}, expected those of 'law', 1, 3 of 4 experts"):
        analyse({"law": LAW, "other": other})


def test_drift_of_a_profile_that_is_not_there_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"drift names \['low'\], but the profiles are \['law'\]"):
        analyse({"law": LAW}, drifts=[("law", "low")])


@pytest.mark.parametrize("top", [0, 5])
def test_more_top_experts_than_a_layer_has_are_refused(top: int) -> None:
    with pytest.raises(SelectionError, match=f"top {top}, expected 1 to 4"):
        analyse({"law": LAW}, top=top)
