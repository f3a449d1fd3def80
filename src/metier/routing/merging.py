"""Add two profiles of one model, and refuse two of different models."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from metier.errors import SelectionError

if TYPE_CHECKING:
    from metier.routing.routing_profile import RoutingProfile

_SAME_SHAPE = ("layer_ids", "num_experts", "top_k")
_SAME_META = ("fingerprint", "adapter")


def merged(mine: RoutingProfile, theirs: RoutingProfile) -> RoutingProfile:
    """The profile of both data sets together; see `RoutingProfile.merge`."""
    refuse_other_model(mine, theirs, role="the profile that it is merged into", why="Only profiles of one model add up")
    norm_HLE = None
    if mine.output_norm_HLE is not None and theirs.output_norm_HLE is not None:
        norm_HLE = mine.output_norm_HLE + theirs.output_norm_HLE
    elif mine.output_norm_HLE is not None or theirs.output_norm_HLE is not None:
        raise SelectionError(
            "output_norm_HLE: got one profile with output norms and one without, so that their sum would be of a "
            "part of the data.\nMeasure both with output_norms=True, or drop them: "
            "dataclasses.replace(profile, output_norm_HLE=None)."
        )
    return dataclasses.replace(
        mine,
        token_counts_HLE=mine.token_counts_HLE + theirs.token_counts_HLE,
        gate_mass_HLE=mine.gate_mass_HLE + theirs.gate_mass_HLE,
        output_norm_HLE=norm_HLE,
        num_tokens_H=(mine.num_tokens_H[0] + theirs.num_tokens_H[0], mine.num_tokens_H[1] + theirs.num_tokens_H[1]),
        meta=_merged_meta(mine.meta, theirs.meta),
    )


def refuse_other_model(mine: RoutingProfile, theirs: RoutingProfile, *, role: str, why: str) -> None:
    """Check that two profiles are of the same layers, experts and model.

    Args:
        mine: the one that sets what is expected.
        theirs: the one that is checked.
        role: what `mine` is, for the message.
        why: why they must be of one model, for the message.

    Raises:
        SelectionError: they differ.
    """
    both = [(name, getattr(mine, name), getattr(theirs, name)) for name in _SAME_SHAPE]
    both += [(n, mine.meta[n], theirs.meta[n]) for n in _SAME_META if n in mine.meta and n in theirs.meta]
    for name, expected, got in both:
        if got != expected:
            raise SelectionError(
                f"{name}: got a profile with {got!r}, expected {expected!r} as in {role}.\n"
                f"{why}; profile both data sets with the same model."
            )


def _merged_meta(mine: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
    """Equal values stay; different ones are listed, sorted, so that the order of merging does not show."""
    meta = {}
    for name in sorted(mine.keys() | theirs.keys()):
        values = {part for m in (mine, theirs) if name in m for part in m[name].split(" + ")}
        meta[name] = " + ".join(sorted(values))
    return meta
