"""Which experts to pick: plain Python on lists of floats, to be read and tested without a model.

Each rule ranks a layer's experts by falling score, ties by expert id, and says how far down the list it
goes. `top_p` is ESFT's rule (arXiv:2407.01906, section 3): until the scores so far cover `top_p`, the expert
that crosses it included. The paper's released script normalises scores over layers instead of experts; we
normalise over a layer's experts, as the published selections were made. The policy that looks at all layers
at once is in `metier.routing.budget`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence

from metier.errors import SelectionError
from metier.routing.budget import pick_within_budget
from metier.routing.selection_config import SCORES, Score, SelectionConfig

__all__ = [
    "COVERED_TOLERANCE",
    "SCORES",
    "Score",
    "SelectionConfig",
    "jaccard",
    "mean_jaccard",
    "pick",
    "pick_coldest",
    "pick_experts",
    "pick_random",
    "pick_top_fraction",
    "pick_top_k",
]

COVERED_TOLERANCE = 1e-9
"""How far below `top_p` a sum may be and still count as equal to it.

0.1 + 0.05 + 0.05 and its like must reach 0.2 whatever the order of addition. Correctly rounded sums of up to
some thousand float64 scores are off by less than 1e-12; scores published with four decimals differ by 1e-4 or
not at all, and one routing slot is worth more than 1e-9 up to 10^9 slots a layer. So the tolerance never
swallows a real difference. The same holds for `top_fraction`: 0.1 of 30 experts are 3, not 4.
"""


def pick(
    scores: Mapping[int, Sequence[float]],
    config: SelectionConfig,
    *,
    expert_bytes: Mapping[int, int] | None = None,
) -> dict[int, tuple[int, ...]]:
    """The experts that `config`'s policy picks, by decoder layer.

    Args:
        scores: one score an expert, by decoder layer; what `config.score` and its companions name.
        config: says the policy.
        expert_bytes: bytes of one expert, by decoder layer; for `budget_bytes` alone.

    Returns:
        Expert ids in order of falling score, by decoder layer. With `budget_bytes` layers may be missing, or
        all of them.

    Raises:
        SelectionError: scores that are not numbers; `top_k` of more experts than there are; raw gate scores
            that sum to less than `top_p`.
    """
    if config.budget_bytes is not None:
        assert expert_bytes is not None, "SelectionConfig.check_inputs comes before"
        return pick_within_budget(scores, expert_bytes=expert_bytes, budget_bytes=config.budget_bytes)
    picked = {}
    for layer, row in scores.items():
        try:
            picked[layer] = _pick_in_layer(row, config)
        except SelectionError as error:
            raise SelectionError(f"layers.{layer}: {error}") from error
    return picked


def _pick_in_layer(scores: Sequence[float], config: SelectionConfig) -> tuple[int, ...]:
    if config.top_k is not None:
        return pick_top_k(scores, top_k=config.top_k)
    if config.top_fraction is not None:
        return pick_top_fraction(scores, top_fraction=config.top_fraction)
    assert config.top_p is not None, "exactly one policy is named"
    total = math.fsum(scores)
    if config.scale == "raw" and not config.minus_general and total < config.top_p - COVERED_TOLERANCE:
        raise SelectionError(
            f"{config.score_name} sum to {total:.4f}, so that they never cover top_p={config.top_p}: this router "
            f"does not renormalise its gates.\nLower top_p, or use scale='normalised'."
        )
    return pick_experts(scores, top_p=config.top_p)


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
    picked: list[int] = []
    for expert in _by_falling_score(scores):
        if math.fsum(scores[e] for e in picked) >= top_p - COVERED_TOLERANCE:
            break
        picked.append(expert)
    return tuple(picked)


def pick_top_k(scores: Sequence[float], *, top_k: int) -> tuple[int, ...]:
    """One layer's `top_k` experts of highest score, by falling score, ties by expert id.

    Args:
        scores: one score an expert; differences may be negative.
        top_k: how many, at least 1.

    Raises:
        SelectionError: more experts are asked for than there are, or a score is not a number.
    """
    _refuse_more_than(len(scores), top_k, "top_k")
    return _by_falling_score(scores)[:top_k]


def pick_top_fraction(scores: Sequence[float], *, top_fraction: float) -> tuple[int, ...]:
    """One layer's highest `top_fraction` of experts, rounded up; otherwise as `pick_top_k`.

    Paper: MoE-Sieve, arXiv:2603.24044, which takes 0.25.
    """
    num_picked = math.ceil(top_fraction * len(scores) - COVERED_TOLERANCE)
    return _by_falling_score(scores)[: max(num_picked, 1)]


def pick_coldest(scores: Sequence[float], *, num_picked: int) -> tuple[int, ...]:
    """One layer's `num_picked` experts of lowest score, by rising score, ties by expert id.

    Raises:
        SelectionError: more experts are asked for than there are, or a score is not a number.
    """
    _refuse_more_than(len(scores), num_picked, "num_picked")
    return _by_falling_score([-score for score in scores])[:num_picked]


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


def mean_jaccard(first: Mapping[int, Collection[int]], second: Mapping[int, Collection[int]]) -> float:
    """Mean `jaccard` over the layers that either names; 1 where neither names any."""
    layers = first.keys() | second.keys()
    if not layers:
        return 1.0
    return math.fsum(jaccard(first.get(layer, ()), second.get(layer, ())) for layer in layers) / len(layers)


def _by_falling_score(scores: Sequence[float]) -> tuple[int, ...]:
    if not scores or not all(math.isfinite(score) for score in scores):
        raise SelectionError(
            f"scores: got {len(scores)} scores, expected at least one, each a finite number.\n"
            f"Profile the model again; what it computes on these records may overflow."
        )
    return tuple(sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert)))


def _refuse_more_than(num_experts: int, num_picked: int, name: str) -> None:
    if num_picked > num_experts:
        raise SelectionError(
            f"{name}: got {num_picked}, but there are only num_experts={num_experts}.\nAsk for {num_experts} at most."
        )
