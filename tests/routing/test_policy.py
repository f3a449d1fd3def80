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
from metier.routing.policy import SelectionConfig, jaccard, pick_experts, pick_random


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
