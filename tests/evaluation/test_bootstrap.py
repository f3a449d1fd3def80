"""Intervals: right width, reproducible, and the same whichever way the draws are grouped."""

from __future__ import annotations

import numpy as np
import pytest

from metier.evaluation import bootstrap
from metier.evaluation.bootstrap import bootstrap_interval, mean_interval, ratio_interval

# Percentiles of 1,000 resamples are themselves uncertain by a few per cent.
RESAMPLING_TOLERANCE = 0.15


def test_interval_of_a_share_has_the_width_of_the_normal_approximation() -> None:
    low, high = mean_interval([100.0] * 120 + [0.0] * 280, seed=0)
    expected = 2 * 1.96 * 100 * np.sqrt(0.3 * 0.7 / 400)
    assert high - low == pytest.approx(expected, rel=RESAMPLING_TOLERANCE)
    assert low < 30 < high


def test_the_seed_decides_the_interval() -> None:
    scores = np.random.default_rng(3).normal(size=50).tolist()
    assert mean_interval(scores, seed=1) == mean_interval(scores, seed=1)
    assert mean_interval(scores, seed=1) != mean_interval(scores, seed=2)


def test_equal_items_give_a_single_point() -> None:
    assert mean_interval([7.0] * 9, seed=0) == (7.0, 7.0)


def test_each_resample_draws_as_many_items_as_there_are() -> None:
    def statistic(counts_BN: bootstrap.Array) -> bootstrap.Array:
        assert (counts_BN.sum(axis=1) == 13).all()
        assert counts_BN.max() > 1
        return counts_BN[:, 0]

    bootstrap_interval(statistic, num_items=13, seed=0, num_resamples=100)


def test_ratio_interval_agrees_with_a_plain_loop() -> None:
    bits, sizes = [8.0, 1.0, 30.0, 4.0, 9.0], [10.0, 2.0, 11.0, 4.0, 20.0]
    generator = np.random.default_rng(5)
    ratios = []
    for _ in range(1000):
        drawn = generator.integers(0, 5, size=5)
        ratios.append(sum(bits[i] for i in drawn) / sum(sizes[i] for i in drawn))
    assert ratio_interval(bits, sizes, seed=5) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))


def test_large_sets_are_drawn_in_rounds_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(3).normal(size=50).tolist()
    at_once = mean_interval(scores, seed=1)
    monkeypatch.setattr(bootstrap, "_MAX_DRAWS_AT_ONCE", 50 * 7)
    assert mean_interval(scores, seed=1) == pytest.approx(at_once)
