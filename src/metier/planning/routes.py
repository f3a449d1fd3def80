"""How likely each expert is to be chosen: by a profile, by what a policy says of its selection, or all alike."""

# L MoE layers, E experts

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metier.config import RunConfig
from metier.errors import SelectionError
from metier.routing.configured import selection_config
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import ExpertSelection

Chances = Mapping[int, Tensor]
"""Decoder layer to its experts' shares of the routes, float32, (E,)."""
_LEAST = 1e-6
"""Of an expert that a profile never saw: it has to be possible, for as many different ones are drawn as a token has."""


def chances_of(profile: RoutingProfile, *, half: int | None = None) -> Chances:
    """As measured, on all data or on the even (0) or odd (1) sequences alone."""
    shares_LE = profile.scores_LE("token", half=half).clamp_min(_LEAST)
    return dict(zip(profile.layer_ids, shares_LE, strict=True))


def assumed_chances(config: RunConfig, selection: ExpertSelection | None) -> tuple[Chances, str]:
    """Without a profile, and in words. Layers that are not among them have experts that are all alike.

    A selection by top_p of token shares has that share of the routes, whichever experts it is.
    """
    top_p = None if selection is None or config.selection is not None else selection_config(config).top_p
    if selection is None or top_p is None or config.score != "token" or config.minus_general:
        return {}, "Where a layer has experts (or Key-Experts), each is as likely as any other to be chosen."
    num_experts = selection.num_experts
    assert num_experts is not None, "a selection that is assumed says of how many"
    chances = {}
    for layer, experts in selection.experts.items():
        others = num_experts - len(experts)
        share_E = torch.full((num_experts,), (1 - top_p) / max(1, others))
        share_E[list(experts)] = top_p / max(1, len(experts))
        chances[layer] = share_E
    return chances, f"The selected experts of a layer have {top_p:.0%} of its routes, as top_p says."


def drawn(shares_E: Tensor, num_tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Each token's experts, int64, (T, K): each expert gets its share of all routes, or a place with every token.

    Systematic sampling: a token's experts lie in an order of its own on a line, each as long as it is likely, and are
    taken at K points one apart. One by one, without putting back, likely experts would get less than their share.
    """
    inclusion_E = _at_most_once(shares_E.double() / shares_E.sum(), top_k)
    order_TE = torch.rand(num_tokens, len(shares_E), generator=generator).argsort(dim=-1)
    ends_TE = inclusion_E[order_TE].cumsum(dim=-1)
    ends_TE[:, -1] = top_k
    first_T1 = torch.rand(num_tokens, 1, generator=generator, dtype=torch.float64)
    points_TK = first_T1 + torch.arange(top_k)
    return order_TE.gather(1, torch.searchsorted(ends_TE, points_TK, right=True).clamp_max(len(shares_E) - 1))


def _at_most_once(shares_E: Tensor, top_k: int) -> Tensor:
    """How likely each expert is to be among a token's; what is over 1 goes to the others in proportion."""
    inclusion_E = top_k * shares_E
    for _ in range(top_k):
        is_over_E = inclusion_E >= 1
        left = top_k - int(is_over_E.sum())
        rest = inclusion_E[~is_over_E].sum()
        if not is_over_E.any() or rest == 0:
            break
        inclusion_E = torch.where(is_over_E, 1.0, inclusion_E * (left / rest))
        if (inclusion_E <= 1 + 1e-9).all():
            break
    return inclusion_E.clamp_max(1.0)


def check_profile(profile: RoutingProfile, layers: Mapping[int, int]) -> None:
    """Refuse a profile of another model.

    Args:
        profile: of the data that will be trained on.
        layers: the model's, and how many experts each has.

    Raises:
        SelectionError: it has other layers, or another number of experts.
    """
    expected, got = sorted(layers), list(profile.layer_ids)
    if got != expected or set(layers.values()) != {profile.num_experts}:
        raise SelectionError(
            f"profile: got layers {got} of {profile.num_experts} experts, expected layers {expected} of "
            f"{sorted(set(layers.values()))}. It was measured on another model; measure this one with metier profile."
        )
