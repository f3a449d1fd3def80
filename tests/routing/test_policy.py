"""The rule by which experts are picked."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import ConfigError, SelectionError
from metier.routing.policy import (
    SelectionConfig,
    jaccard,
    mean_jaccard,
    pick,
    pick_coldest,
    pick_experts,
    pick_random,
    pick_top_fraction,
    pick_top_k,
)


def test_experts_come_by_falling_score_and_the_crossing_one_is_included() -> None:
    assert pick_experts([0.1, 0.4, 0.2, 0.3], top_p=0.5) == (1, 3)
    assert pick_experts([0.1, 0.4, 0.2, 0.3], top_p=0.71) == (1, 3, 2)


def test_one_expert_is_enough_where_it_covers_all() -> None:
    assert pick_experts([0.1, 0.9], top_p=0.9) == (1,)


def test_ties_break_by_expert_id() -> None:
    assert pick_experts([0.1, 0.3, 0.3, 0.3], top_p=0.6) == (1, 2)


@pytest.mark.parametrize(
    "scores",
    [[0.1, 0.05, 0.05, 0.04], [0.059, 0.051, 0.045, 0.045, 0.045], [0.06, 0.05, 0.03, 0.03, 0.03, 0.03]],
)
def test_scores_that_reach_top_p_exactly_stop_there(scores: list[float]) -> None:
    exact = Fraction(0)
    needed = 0
    while exact < Fraction("0.2"):
        exact += Fraction(str(scores[needed]))
        needed += 1
    assert exact == Fraction("0.2")
    assert pick_experts(scores, top_p=0.2) == tuple(range(needed))


def test_one_slot_below_top_p_is_below() -> None:
    slots = 131_072 * 8  # more than a usual profile has
    fifth = slots // 5
    assert Fraction(fifth, slots) < Fraction("0.2")
    assert pick_experts([fifth / slots, 0.1, 0.1], top_p=0.2) == (0, 1)
    assert pick_experts([(fifth + 1) / slots, 0.1, 0.1], top_p=0.2) == (0,)


def test_rounded_scores_that_never_reach_top_p_give_all_experts() -> None:
    assert pick_experts([0.3333, 0.3333, 0.3333], top_p=1.0) == (0, 1, 2)


@given(
    counts=st.lists(st.integers(0, 500), min_size=1, max_size=70).filter(any),
    top_p=st.sampled_from([0.05, 0.1, 0.2, 0.5, 0.75, 1.0]),
)
def test_it_is_the_shortest_prefix_that_covers_top_p(counts: list[int], top_p: float) -> None:
    total = sum(counts)
    picked = pick_experts([count / total for count in counts], top_p=top_p)
    threshold = Fraction(str(top_p)) * total
    assert sum(counts[e] for e in picked) >= threshold
    assert sum(counts[e] for e in picked[:-1]) < threshold
    assert [(-counts[e], e) for e in picked] == sorted((-c, e) for e, c in enumerate(counts))[: len(picked)]


@pytest.mark.parametrize("scores", [[], [0.5, -0.1], [0.5, math.nan]])
def test_scores_that_are_none_are_an_error(scores: list[float]) -> None:
    with pytest.raises(SelectionError, match=rf"scores: got {len(scores)} scores, expected at least one"):
        pick_experts(scores, top_p=0.5)


@pytest.mark.parametrize("top_p", [0, -0.1, 1.01, math.nan, True, "0.2"])
def test_a_top_p_outside_its_range_is_an_error(top_p: float) -> None:
    with pytest.raises(ConfigError, match=r"top_p must be in \(0, 1\], got"):
        SelectionConfig(score="token", top_p=top_p)


def test_an_unknown_score_is_an_error() -> None:
    with pytest.raises(ConfigError, match="score: got 'gates', expected one of 'gate', 'token'"):
        SelectionConfig(score="gates", top_p=0.2)  # type: ignore[arg-type]


def test_random_picks_are_distinct_sorted_and_cover_all_experts_in_time() -> None:
    generator = random.Random(0)
    picks = [pick_random(3, num_experts=8, generator=generator) for _ in range(100)]
    assert all(len(set(pick)) == 3 and list(pick) == sorted(pick) for pick in picks)
    assert {expert for pick in picks for expert in pick} == set(range(8))


def test_more_random_picks_than_experts_is_an_error() -> None:
    with pytest.raises(SelectionError, match="got 9 experts to pick, but there are only num_experts=8"):
        pick_random(9, num_experts=8, generator=random.Random(0))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((1, 2), (2, 1), 1), ((1, 2), (2, 3), 1 / 3), ((), (1,), 0), ((), (), 1)],
)
def test_jaccard(first: tuple[int, ...], second: tuple[int, ...], expected: float) -> None:
    assert jaccard(first, second) == expected


def test_the_policy_needs_no_torch() -> None:
    code = "import sys, metier.routing.policy, metier.routing.esft_format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ROWS = st.lists(st.sampled_from([-0.5, 0.0, 0.1, 0.25, 0.3, 1.0]), min_size=1, max_size=40)


@given(scores=ROWS, data=st.data())
def test_top_k_is_the_head_of_the_ranking(scores: list[float], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, len(scores)))
    picked = pick_top_k(scores, top_k=top_k)
    assert len(set(picked)) == len(picked) == top_k
    assert [(-scores[e], e) for e in picked] == sorted((-s, e) for e, s in enumerate(scores))[:top_k]
    assert pick_top_k(scores, top_k=data.draw(st.integers(top_k, len(scores))))[:top_k] == picked


@given(scores=ROWS, percent=st.integers(1, 100), more=st.integers(0, 99))
def test_top_fraction_is_top_k_rounded_up(scores: list[float], percent: int, more: int) -> None:
    picked = pick_top_fraction(scores, top_fraction=percent / 100)
    exact = math.ceil(Fraction(percent, 100) * len(scores))
    assert picked == pick_top_k(scores, top_k=exact)
    assert pick_top_fraction(scores, top_fraction=min(percent + more, 100) / 100)[:exact] == picked


def test_a_fraction_of_a_whole_number_is_not_rounded_up_further() -> None:
    assert math.ceil(0.07 * 100) == 8  # what a float makes of it
    assert len(pick_top_fraction([0.0] * 100, top_fraction=0.07)) == 7


def test_the_smallest_fraction_is_one_expert() -> None:
    assert pick_top_fraction([0.1, 0.9], top_fraction=1e-12) == (1,)


@given(scores=ROWS, data=st.data())
def test_the_coldest_are_the_tail_of_the_ranking(scores: list[float], data: st.DataObject) -> None:
    num_picked = data.draw(st.integers(1, len(scores)))
    picked = pick_coldest(scores, num_picked=num_picked)
    assert [(scores[e], e) for e in picked] == sorted((s, e) for e, s in enumerate(scores))[:num_picked]


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), low=st.integers(1, 100))
def test_a_larger_top_p_only_adds(counts: list[int], low: int) -> None:
    scores = [count / sum(counts) for count in counts]
    picked = pick_experts(scores, top_p=low / 100)
    assert pick_experts(scores, top_p=1.0)[: len(picked)] == picked


@pytest.mark.parametrize("scores", [[], [0.5, math.nan], [0.5, math.inf]])
def test_scores_that_cannot_be_ranked_are_an_error(scores: list[float]) -> None:
    for pick_some in (
        lambda: pick_top_k(scores, top_k=0),
        lambda: pick_top_fraction(scores, top_fraction=0.5),
        lambda: pick_coldest(scores, num_picked=0),
    ):
        with pytest.raises(
            SelectionError, match=rf"scores: got {len(scores)} scores, expected at least one, each a finite"
        ):
            pick_some()


def test_more_experts_than_there_are_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(
        SelectionError, match=r"layers\.7: top_k: got 3, but there are only num_experts=2\.\nAsk for 2 at"
    ):
        pick({5: [0.5, 0.25, 0.25], 7: [0.5, 0.5]}, SelectionConfig(score="token", top_k=3))


def test_pick_applies_the_policy_that_is_named_in_each_layer() -> None:
    scores = {2: [0.6, 0.3, 0.1, 0.0], 5: [0.1, 0.2, 0.3, 0.4]}
    assert pick(scores, SelectionConfig(score="token", top_p=0.7)) == {2: (0, 1), 5: (3, 2)}
    assert pick(scores, SelectionConfig(score="token", top_k=1)) == {2: (0,), 5: (3,)}
    assert pick(scores, SelectionConfig(score="token", top_fraction=0.75)) == {2: (0, 1, 2), 5: (3, 2, 1)}
    budget = SelectionConfig(score="token", budget_bytes=3)
    assert pick(scores, budget, expert_bytes={2: 1, 5: 1}) == {2: (0, 1), 5: (3,)}


def test_normalised_scores_that_rounding_keeps_below_top_p_give_all_experts() -> None:
    assert pick({0: [0.3333, 0.3333, 0.3333]}, SelectionConfig(score="token", top_p=1.0)) == {0: (0, 1, 2)}


def test_raw_scores_that_reach_top_p_are_picked_from() -> None:
    config = SelectionConfig(score="gate", top_p=0.3, scale="raw")
    assert pick({0: [0.1, 0.2]}, config) == {0: (1, 0)}
    assert math.fsum([0.1, 0.7]) < 0.8
    assert pick({0: [0.1, 0.7]}, SelectionConfig(score="gate", top_p=0.8, scale="raw")) == {0: (1, 0)}
    with pytest.raises(SelectionError, match=r"layers\.0: raw gate scores sum to 0\.2900, so that they never cover"):
        pick({0: [0.1, 0.19]}, config)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({1: (1, 2), 2: (5,)}, {1: (2, 1), 2: (6,)}, 0.5),
        ({1: (1, 2)}, {1: (1, 2), 2: (6,)}, 0.5),
        ({}, {}, 1),
    ],
)
def test_mean_jaccard_is_over_the_layers_that_either_names(
    first: dict[int, tuple[int, ...]], second: dict[int, tuple[int, ...]], expected: float
) -> None:
    assert mean_jaccard(first, second) == mean_jaccard(second, first) == expected
