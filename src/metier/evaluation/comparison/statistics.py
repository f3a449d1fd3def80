"""What several seeds on the same items say together: a mean, its interval, and whether two candidates differ at all."""

# S seeds, N items, B resamples

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from metier.evaluation.bootstrap import NUM_RESAMPLES
from metier.evaluation.result import Change

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Seeds:
    """One candidate's scores on one task: a value for each seed, and for each seed and item."""

    values: tuple[float, ...]
    """The metric itself; for corpus metrics it is not the items' mean."""
    items_SN: Array

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    def resampled(self, num_resamples: int = NUM_RESAMPLES) -> Array:
        """The mean over other seeds and items that might have been drawn, (B,).

        Items are drawn alike for every candidate, so that two of them are compared on the same ones. Seeds are drawn
        with replacement among those that were run; that few of them say little of the others is made up for by
        spreading their draws as Student's distribution has it.
        """
        num_seeds, num_items = self.items_SN.shape
        means_SB = self.items_SN @ _drawn(num_items, num_resamples) / num_items
        chosen_BS = np.random.default_rng(1 + num_seeds).integers(0, num_seeds, size=(num_resamples, num_seeds))
        of_items_B = means_SB.mean(0)
        of_seeds_B: Array = means_SB[chosen_BS, np.arange(num_resamples)[:, None]].mean(1) - of_items_B
        found_B: Array = of_items_B + _spread(num_seeds) * of_seeds_B + (self.mean - float(self.items_SN.mean()))
        return found_B


@cache
def _drawn(num_items: int, num_resamples: int) -> Array:
    """How often each resample draws each item, (N, B): the same for all candidates."""
    draws_BN = np.random.default_rng(0).integers(0, num_items, size=(num_resamples, num_items))
    counts_BN = np.zeros((num_resamples, num_items))
    np.add.at(counts_BN, (np.arange(num_resamples)[:, None], draws_BN), 1)
    return counts_BN.T


def interval(found_B: Array, value: float) -> Change:
    """A value with the 2.5th and 97.5th percentile of its resamples."""
    low, high = np.percentile(found_B, [2.5, 97.5])
    return Change(value=value, low=float(min(low, value)), high=float(max(high, value)))


def differs_from_one(value: Seeds, fixed: Seeds) -> bool:
    """`differs`, where the second side has no seeds to differ by, as the untouched base."""
    low, high = np.percentile(value.resampled() - fixed.resampled(), [2.5, 97.5])
    return bool(low > 0 or high < 0)


def score_of(seeds: Seeds) -> Change:
    """The mean over seeds, with a 95% interval over seeds and items."""
    return interval(seeds.resampled(), seeds.mean)


_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Of 1, 2 … degrees of freedom, the 97.5th percentile."""


def _spread(num_seeds: int) -> float:
    """How much wider than its resamples the mean of so many seeds is spread; 1 in the limit."""
    if num_seeds < 2:
        return 1.0
    student = _STUDENT[num_seeds - 2] if num_seeds - 2 < len(_STUDENT) else 2.0
    return student / 1.96 * math.sqrt(num_seeds / (num_seeds - 1))


def differs(first: Seeds, second: Seeds) -> bool:
    """Whether the 95% interval of the difference of two candidates on the same items leaves out 0.

    One seed says nothing of others, so that two candidates of which one has a single seed are not told apart.
    """
    if min(len(first.values), len(second.values)) < 2:
        return False
    return differs_from_one(first, second)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Points (cost, score) that no other beats in both: cheapest first.

    Args:
        points: lower cost is better, higher score is better.

    Returns:
        their places in `points`.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    found, best = [], float("-inf")
    for index in order:
        if points[index][1] > best:
            found.append(index)
            best = points[index][1]
    return found
