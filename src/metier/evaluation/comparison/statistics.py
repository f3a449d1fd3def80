"""What several seeds on the same items say together: a mean, its interval, and whether two candidates differ at all."""

# S seeds, N items, B resamples

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

        Items are drawn alike for every candidate, so that two of them are compared on the same ones; seeds are drawn
        with replacement among those that were run, which with three of them is little to draw from.
        """
        num_seeds, num_items = self.items_SN.shape
        generator = np.random.default_rng(0)
        draws_BN = generator.integers(0, num_items, size=(num_resamples, num_items))
        means_SB = np.stack([row_N[draws_BN].mean(1) for row_N in self.items_SN])
        chosen_BS = np.random.default_rng(1 + num_seeds).integers(0, num_seeds, size=(num_resamples, num_seeds))
        found_B: Array = means_SB[chosen_BS, np.arange(num_resamples)[:, None]].mean(1)
        return found_B + (self.mean - float(self.items_SN.mean()))


def interval(found_B: Array, value: float) -> Change:
    """A value with the 2.5th and 97.5th percentile of its resamples."""
    low, high = np.percentile(found_B, [2.5, 97.5])
    return Change(value=value, low=float(min(low, value)), high=float(max(high, value)))


def score_of(seeds: Seeds) -> Change:
    """The mean over seeds, with a 95% interval over seeds and items."""
    return interval(seeds.resampled(), seeds.mean)


def differs(first: Seeds, second: Seeds) -> bool:
    """Whether the 95% interval of the difference of two candidates on the same items leaves out 0."""
    low, high = np.percentile(first.resampled() - second.resampled(), [2.5, 97.5])
    return bool(low > 0 or high < 0)


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
