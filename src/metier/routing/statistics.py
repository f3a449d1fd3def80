"""How concentrated a task's routing is, and how much two tasks' experts overlap: figures 2 and 3 of the ESFT
paper."""

# L MoE layers, E experts

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.errors import SelectionError
from metier.routing.policy import jaccard
from metier.routing.selection import ExpertSelection


def top_share(scores_LE: Tensor, k: int) -> Tensor:
    """Share of each layer's score that its `k` highest experts hold.

    Args:
        scores_LE: non-negative, (num_layers, num_experts); need not be normalised.
        k: how many experts, 1 to num_experts. With even routing the result is k / num_experts.

    Returns:
        float32, (num_layers,), in (0, 1].

    Paper: ESFT, arXiv:2407.01906, figure 2.
    """
    _check_k(scores_LE, k)
    scores_LE = scores_LE.to(torch.float64)
    return (scores_LE.topk(k, dim=1).values.sum(dim=1) / scores_LE.sum(dim=1)).to(torch.float32)


def shared_top_k(first_LE: Tensor, second_LE: Tensor, k: int) -> Tensor:
    """How many of the `k` highest experts two tasks share, by layer; ties break by expert id.

    Args:
        first_LE, second_LE: scores of the same model's layers and experts, (num_layers, num_experts).
        k: how many experts, 1 to num_experts. Two random sets share k * k / num_experts.

    Returns:
        int64, (num_layers,), from 0 to k.

    Raises:
        SelectionError: the shapes differ, or k is out of range.

    Paper: ESFT, arXiv:2407.01906, figure 3, with k = 6.
    """
    if first_LE.shape != second_LE.shape:
        raise SelectionError(
            f"scores: got {tuple(first_LE.shape)} and {tuple(second_LE.shape)}, expected the same layers and "
            f"experts.\nOnly profiles of one model can be compared."
        )
    _check_k(first_LE, k)
    chosen_LE = [
        torch.zeros_like(scores_LE, dtype=torch.bool).scatter_(
            1, scores_LE.sort(dim=1, descending=True, stable=True).indices[:, :k], True
        )
        for scores_LE in (first_LE, second_LE)
    ]
    return (chosen_LE[0] & chosen_LE[1]).sum(dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How much two selections have in common, as means over the layers that either of them names."""

    num_shared_experts: float
    """Experts that both name, a layer."""
    jaccard: float
    """Shared over named by either, from 0 to 1."""


def overlap(first: ExpertSelection, second: ExpertSelection) -> Overlap:
    """What two selections of one model have in common; a layer that one of them leaves out shares nothing."""
    layers = sorted(first.experts.keys() | second.experts.keys())
    if not layers:
        raise SelectionError("overlap: neither selection names a routed expert, so there is nothing to compare.")
    pairs = [(first.experts.get(layer, ()), second.experts.get(layer, ())) for layer in layers]
    return Overlap(
        num_shared_experts=sum(len(set(a) & set(b)) for a, b in pairs) / len(pairs),
        jaccard=sum(jaccard(a, b) for a, b in pairs) / len(pairs),
    )


def _check_k(scores_LE: Tensor, k: int) -> None:
    if not 1 <= k <= scores_LE.shape[1]:
        raise SelectionError(f"k: got {k}, expected 1 to num_experts={scores_LE.shape[1]}.")
