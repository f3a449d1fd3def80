"""Selections to compare with: as many experts in each layer, but drawn at random, or the least used ones.

A selection that is worth its measurement beats both. The paper's table 4 has the first.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from metier.errors import SelectionError
from metier.routing.expert_selection import ExpertSelection
from metier.routing.policy import Score, pick_coldest, pick_random

if TYPE_CHECKING:
    from metier.routing.routing_profile import RoutingProfile


def random_selection(like: ExpertSelection, *, num_experts: int, seed: int) -> ExpertSelection:
    """As many experts in each layer as `like` has, drawn at random: the baseline of the paper's table 4.

    Args:
        like: the selection whose counts and flags are copied.
        num_experts: routed experts a layer of the model.
        seed: the same seed gives the same selection.

    Raises:
        SelectionError: a layer of `like` has more experts than `num_experts`.
    """
    generator = random.Random(seed)
    return ExpertSelection(
        experts={
            layer: pick_random(len(like.experts[layer]), num_experts=num_experts, generator=generator)
            for layer in sorted(like.experts)
        },
        shared_experts=like.shared_experts,
        non_expert_modules=like.non_expert_modules,
        num_experts=num_experts,
    )


def coldest_selection(like: ExpertSelection, profile: RoutingProfile, *, score: Score) -> ExpertSelection:
    """As many experts in each layer as `like` has, those of the lowest scores: what the task uses least.

    Where `like` has more than half of a layer, the two overlap.

    Args:
        like: the selection whose counts and flags are copied.
        profile: the task's.
        score: what to rank by; lowest first, ties by expert id.

    Raises:
        SelectionError: `like` names a layer that was not profiled, or more experts than there are; or the
            profile has no such score.
    """
    rows = dict(zip(profile.layer_ids, profile.exact_scores_LE(score).tolist(), strict=True))
    unknown = sorted(like.experts.keys() - rows.keys())
    if unknown:
        raise SelectionError(
            f"layers.{unknown[0]}: the selection names experts there, but the profile has the layers "
            f"{list(profile.layer_ids)}.\nTake the selection and the profile of one model."
        )
    return ExpertSelection(
        experts={
            layer: pick_coldest(rows[layer], num_picked=len(like.experts[layer])) for layer in sorted(like.experts)
        },
        shared_experts=like.shared_experts,
        non_expert_modules=like.non_expert_modules,
        num_experts=profile.num_experts,
    )
