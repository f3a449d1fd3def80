"""What a metric says of N replies; in a file of its own because every metric makes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from metier.evaluation.bootstrap import mean_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemScores:
    """What a metric says of N replies: the score of all, of each, and how many were unreadable."""

    value: float
    items: tuple[float, ...]
    interval: Callable[[int, int], tuple[float, float]]
    """(seed, num_resamples) → the 95% interval of `value`."""
    num_unparsed: int = 0


def mean_of_items(items: Sequence[float], *, num_unparsed: int = 0) -> ItemScores:
    """The scores of a metric whose value is the mean of its items."""
    return ItemScores(
        value=float(np.mean(items)),
        items=tuple(items),
        interval=lambda seed, num_resamples: mean_interval(items, seed=seed, num_resamples=num_resamples),
        num_unparsed=num_unparsed,
    )
