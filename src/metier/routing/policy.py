"""Which experts to pick: plain Python on lists of floats, to be read and tested without a model.

The rule is ESFT's (arXiv:2407.01906, section 3): a layer's experts by falling score until the scores so far
cover `top_p`, the expert that crosses it included. The paper's released script normalises scores over layers
instead of experts; we normalise over a layer's experts, as the published selections were made.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from metier.errors import ConfigError, SelectionError

Score = Literal["gate", "token"]
SCORES: tuple[Score, ...] = ("gate", "token")

COVERED_TOLERANCE = 1e-9
"""How far below `top_p` a sum may be and still count as equal to it.

0.1 + 0.05 + 0.05 and its like must reach 0.2 whatever the order of addition. Correctly rounded sums of up to
some thousand float64 scores are off by less than 1e-12; scores published with four decimals differ by 1e-4 or
not at all, and one routing slot is worth more than 1e-9 up to 10^9 slots a layer. So the tolerance never
swallows a real difference.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """How experts are chosen from a profile."""

    score: Score
    """"token": share of routing slots; "gate": share of gate mass."""
    top_p: float
    """Share of one layer's score that the selected experts must cover, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ConfigError(f"score: got {self.score!r}, expected one of {', '.join(map(repr, SCORES))}.")
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p must be in (0, 1], got {self.top_p!r}; the paper's setting for token scores is 0.2."
            )


def pick_experts(scores: Sequence[float], *, top_p: float) -> tuple[int, ...]:
    """One layer's experts by falling score, ties by expert id, until their scores reach `top_p`.

    Args:
        scores: one non-negative score an expert; they should sum to 1.
        top_p: share to cover, in (0, 1]. The expert that crosses it is included. Where rounded scores never
            reach it, all experts are picked.

    Returns:
        Expert ids in order of falling score; at least one.

    Raises:
        SelectionError: no scores, or one that is negative or not a number.
    """
    if not scores or not all(score >= 0 for score in scores):  # also false for NaN
        raise SelectionError(
            f"scores: got {len(scores)} scores, expected at least one, each a number of at least 0.\n"
            f"Profile the model on more tokens; a layer that saw none has no scores."
        )
    by_score = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
    picked: list[int] = []
    for expert in by_score:
        if math.fsum(scores[e] for e in picked) >= top_p - COVERED_TOLERANCE:
            break
        picked.append(expert)
    return tuple(picked)


def pick_random(num_picked: int, *, num_experts: int, generator: random.Random) -> tuple[int, ...]:
    """`num_picked` different expert ids, uniformly, in rising order.

    Raises:
        SelectionError: more experts are asked for than there are.
    """
    if num_picked > num_experts:
        raise SelectionError(
            f"got {num_picked} experts to pick, but there are only num_experts={num_experts}.\n"
            f"Pass the number of experts of the model that the selection was made for."
        )
    return tuple(sorted(generator.sample(range(num_experts), num_picked)))


def jaccard(first: Collection[int], second: Collection[int]) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    union = set(first) | set(second)
    return len(set(first) & set(second)) / len(union) if union else 1.0
