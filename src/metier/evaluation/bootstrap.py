"""Confidence intervals by resampling items: what a score would have been on another draw of the same test
set.

Every number that metier prints about quality comes from a few hundred items, so each carries a 95% interval.
The statistic of a resample is a function of how often each item was drawn; that one form serves means (exact
match), ratios of sums (bits per byte) and corpus scores that add counts up first (chrF).
"""

# B resamples, N items

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

NUM_RESAMPLES = 1000
_MAX_DRAWS_AT_ONCE = 4_000_000  # 32 MB of int64 draws; larger test sets are resampled in several rounds


def bootstrap_interval(
    statistic: Callable[[Array], Array], *, num_items: int, seed: int, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of a statistic over resamples of the items, with replacement.

    Args:
        statistic: maps counts_BN (float64, how often each of N items was drawn in each of B resamples) to B
            values.
        num_items: N, at least 1.
        seed: the same seed gives the same draws, so two scores over the same items are compared on equal
            resamples.
        num_resamples: how many resamples to draw.

    Returns:
        (low, high). Where every item has the same score the interval is a single point: the percentile
        bootstrap knows no more than its sample.
    """
    assert num_items > 0, "an interval needs at least one item"
    generator = np.random.default_rng(seed)
    round_size = max(1, _MAX_DRAWS_AT_ONCE // num_items)
    values: list[Array] = []
    for start in range(0, num_resamples, round_size):
        num_rows = min(round_size, num_resamples - start)
        draws_BN = generator.integers(0, num_items, size=(num_rows, num_items))
        offsets_B1 = np.arange(num_rows)[:, None] * num_items
        counts = np.bincount((draws_BN + offsets_B1).ravel(), minlength=num_rows * num_items)
        values.append(statistic(counts.reshape(num_rows, num_items).astype(np.float64)))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def mean_interval(
    item_scores: Sequence[float], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """95% interval of the mean of `item_scores`, in their unit."""
    scores_N = np.asarray(item_scores, dtype=np.float64)
    return bootstrap_interval(
        lambda counts_BN: counts_BN @ scores_N / len(scores_N),
        num_items=len(scores_N),
        seed=seed,
        num_resamples=num_resamples,
    )


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """95% interval of sum(numerators) / sum(denominators), both drawn together (a document's bits, bytes)."""
    numerators_N = np.asarray(numerators, dtype=np.float64)
    denominators_N = np.asarray(denominators, dtype=np.float64)
    return bootstrap_interval(
        lambda counts_BN: (counts_BN @ numerators_N) / (counts_BN @ denominators_N),
        num_items=len(numerators_N),
        seed=seed,
        num_resamples=num_resamples,
    )
