"""Routing profiles made of token counts, so that their scores are known."""

from __future__ import annotations

import torch

from metier.routing.routing_profile import RoutingProfile


def counted_profile(counts: list[list[int]], layers: tuple[int, ...] = (1, 3)) -> RoutingProfile:
    """Token counts by layer and expert, split over the two halves; top_k is 2."""
    counts_LE = torch.tensor(counts)
    halves_HLE = torch.stack([counts_LE // 2, counts_LE - counts_LE // 2])
    num_tokens = int(counts_LE[0].sum()) // 2
    return RoutingProfile(
        layer_ids=layers,
        num_experts=counts_LE.shape[1],
        top_k=2,
        token_counts_HLE=halves_HLE,
        gate_mass_HLE=halves_HLE.double(),
        num_tokens_H=(num_tokens // 2, num_tokens - num_tokens // 2),
    )
