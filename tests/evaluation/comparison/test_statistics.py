"""Intervals over seeds and items, ties, fronts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.evaluation.comparison.statistics import Seeds, differs, differs_from_one, front, score_of


def seeds(items_SN: np.ndarray, shift: float = 0.0) -> Seeds:
    return Seeds(tuple(items_SN.mean(1) + shift), items_SN)


def test_an_interval_is_as_wide_as_the_noise_of_the_items_says() -> None:
    items_SN = np.random.default_rng(0).normal(50, 10, size=(1, 400))
    found = score_of(seeds(items_SN))
    assert found.value == pytest.approx(items_SN.mean())
    # the normal distribution's 95%, up to the noise of a bootstrap
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * items_SN.std() / 20, rel=0.1)


def test_seeds_that_disagree_widen_it() -> None:
    items_SN = np.full((3, 50), 10.0)
    apart = items_SN + np.array([[-3.0], [0.0], [3.0]])
    assert score_of(seeds(items_SN)).high - score_of(seeds(items_SN)).low == 0
    assert score_of(seeds(apart)).high - score_of(seeds(apart)).low > 3


def test_a_corpus_metric_keeps_its_own_value() -> None:
    found = score_of(seeds(np.random.default_rng(0).normal(50, 10, size=(2, 60)), shift=5.0))
    assert found.low < found.value < found.high


def test_resamples_are_means_of_the_items_that_each_draws() -> None:
    items_SN = np.random.default_rng(0).normal(50, 20, size=(1, 7))
    draws_BN = np.random.default_rng(0).integers(0, 7, size=(100, 7))
    assert seeds(items_SN).resampled(100) == pytest.approx(items_SN[0][draws_BN].mean(1))


def test_candidates_are_compared_on_the_same_items() -> None:
    hard = np.repeat(np.random.default_rng(0).normal(50, 20, size=(1, 100)), 3, axis=0)
    assert differs(seeds(hard), seeds(hard + 1))
    assert not differs(seeds(hard), seeds(hard))
    other = np.repeat(np.random.default_rng(1).normal(51, 20, size=(1, 100)), 3, axis=0)
    assert not differs(seeds(hard), seeds(other))


def test_one_seed_tells_no_two_candidates_apart() -> None:
    hard = np.random.default_rng(0).normal(50, 20, size=(1, 100))
    assert not differs(seeds(hard), seeds(hard + 10))
    # what has no seeds to differ by may be told from it
    assert differs_from_one(seeds(hard + 10), seeds(hard))


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_equal_candidates_are_seldom_told_apart_however_much_seeds_differ(num_seeds: int) -> None:
    generator = np.random.default_rng(0)
    false = 0
    for _ in range(60):
        items = generator.normal(50, 20, size=(1, 100))
        one, two = (
            seeds(items + generator.normal(0, 4, size=(num_seeds, 1)) + generator.normal(0, 10, size=(num_seeds, 100)))
            for _ in range(2)
        )
        false += differs(one, two)
    # 5% is what the interval says; 60 draws of it are seldom more than 7
    assert false <= 7


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    best = front(points)
    assert best
    for index, (cost, score) in enumerate(points):
        is_beaten = any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
        if is_beaten:
            assert index not in best
        else:
            assert (cost, score) in [points[one] for one in best]
