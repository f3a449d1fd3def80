"""What profiles of one model say about it: how concentrated routing is, what tasks share, and what training moved.

The ESFT paper's figures 2 and 3 (arXiv:2407.01906), and drift. From saved profiles alone; no model is needed.
"""

# L MoE layers, E experts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from metier.errors import SelectionError
from metier.routing.drift import Drift, drift
from metier.routing.policy import Score
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import SelectionConfig
from metier.routing.statistics import shared_top_k, top_share

TOP_P = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileFacts:
    """One profile in figures."""

    num_tokens: int
    reliability: float | None
    """Split-half Jaccard of the experts selected at top_p 0.2, mean over layers; None where a half is empty."""
    top_share: dict[int, list[float]]
    """By number of experts, then by layer: the share of the score that so many of the highest experts hold."""
    num_selected: dict[float, float]
    """By top_p: experts that it selects, mean over layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedExperts:
    """How many of the highest experts two profiles share."""

    first: str
    second: str
    by_layer: list[int]
    mean: float
    chance: float
    """What two random sets of as many experts share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Profiles of one model, compared."""

    score: Score
    top: int
    """How many of the highest experts `shared` and `drifts` look at."""
    layer_ids: tuple[int, ...]
    num_experts: int
    profiles: dict[str, ProfileFacts]
    shared: tuple[SharedExperts, ...]
    drifts: dict[str, Drift]
    """By `before → after`."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return asdict(self)


def analyse(
    profiles: Mapping[str, RoutingProfile],
    *,
    drifts: Sequence[tuple[str, str]] = (),
    score: Score = "token",
    top: int | None = None,
) -> Analysis:
    """Compare profiles of one model.

    Args:
        profiles: by name, of the same layers and experts.
        drifts: pairs of names, before and after.
        score: which score is looked at; each layer's sums to 1.
        top: how many of the highest experts count as top experts; None takes the router's top_k.

    Raises:
        SelectionError: no profile, profiles of different models, an unknown name, or `top` out of range.
    """
    if not profiles:
        raise SelectionError("analyse: got no profile, expected at least one.")
    first_name, first = next(iter(profiles.items()))
    for name, profile in profiles.items():
        if (profile.layer_ids, profile.num_experts) != (first.layer_ids, first.num_experts):
            raise SelectionError(
                f"analyse: {name!r} has layers {_spans(profile)}, expected those of {first_name!r}, {_spans(first)}. "
                "Only profiles of one model can be compared."
            )
    unknown = sorted({name for pair in drifts for name in pair} - profiles.keys())
    if unknown:
        raise SelectionError(f"analyse: drift names {unknown}, but the profiles are {sorted(profiles)}.")
    top = first.top_k if top is None else top
    if not 1 <= top <= first.num_experts:
        raise SelectionError(f"analyse: top {top}, expected 1 to {first.num_experts}, the experts of a layer.")
    names = list(profiles)
    return Analysis(
        score=score,
        top=top,
        layer_ids=tuple(first.layer_ids),
        num_experts=first.num_experts,
        profiles={name: _facts(profile, score, top) for name, profile in profiles.items()},
        shared=tuple(
            _shared(names[i], names[j], profiles, score, top)
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ),
        drifts={f"{a} → {b}": drift(profiles[a], profiles[b], score=score, top=top) for a, b in drifts},
    )


def _spans(profile: RoutingProfile) -> str:
    return f"{', '.join(map(str, profile.layer_ids))} of {profile.num_experts} experts"


def _facts(profile: RoutingProfile, score: Score, top: int) -> ProfileFacts:
    scores_LE, num_experts = profile.scores_LE(score), profile.num_experts
    ranks = sorted({rank for rank in (1, top, 2 * top, -(-num_experts // 4)) if rank <= num_experts})
    sizes = {}
    for top_p in TOP_P:
        picked = profile.picked(SelectionConfig(score=score, top_p=top_p))
        sizes[top_p] = sum(map(len, picked.values())) / len(profile.layer_ids)
    return ProfileFacts(
        num_tokens=profile.num_tokens,
        reliability=profile.reliability(SelectionConfig(score=score, top_p=0.2)),
        top_share={rank: top_share(scores_LE, rank).tolist() for rank in ranks},
        num_selected=sizes,
    )


def _shared(first: str, second: str, profiles: Mapping[str, RoutingProfile], score: Score, top: int) -> SharedExperts:
    shared_L = shared_top_k(profiles[first].scores_LE(score), profiles[second].scores_LE(score), top)
    return SharedExperts(
        first=first,
        second=second,
        by_layer=shared_L.tolist(),
        mean=float(shared_L.double().mean()),
        chance=top * top / profiles[first].num_experts,
    )
