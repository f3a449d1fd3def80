"""Drift: how a model's routing differs between two profiles, such as before and after training.

The router is never trained, but its inputs are made by the experts below it, so what they learn moves the routing of
the layers above. The same comparison tells a task's routing from general text's.
"""

# L MoE layers, E experts

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from metier.errors import SelectionError
from metier.routing.policy import Score
from metier.routing.routing_profile import RoutingProfile
from metier.routing.statistics import shared_top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMove:
    """One expert's share of its layer's score before and after."""

    layer: int
    expert: int
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDrift:
    """How one layer's routing moved."""

    layer: int
    moved_share: float
    """Share of the score that went to other experts, the total variation distance: 0 to 1."""
    divergence: float
    """Jensen-Shannon divergence in bits: 0 where both are alike, 1 where they have no expert in common."""
    num_shared_top: int
    """How many of the `top` highest experts of both are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How routing moved, layer by layer, and the experts that moved most."""

    score: Score
    top: int
    layers: tuple[LayerDrift, ...]
    moves: tuple[ExpertMove, ...]
    """By falling size of the change, ties by layer and expert."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return asdict(self)


def drift(
    before: RoutingProfile, after: RoutingProfile, *, score: Score = "token", top: int = 6, num_moves: int = 20
) -> Drift:
    """Compare two profiles of one model on the same data, or of one model on two kinds of data.

    Args:
        before: the profile that changes are counted from.
        after: of the same layers and experts.
        score: which score is compared; each layer's sums to 1.
        top: how many of the highest experts are looked at for `num_shared_top`.
        num_moves: how many single experts are listed.

    Raises:
        SelectionError: the profiles are of different models, or `top` is out of range.
    """
    if before.layer_ids != after.layer_ids or before.num_experts != after.num_experts:
        raise SelectionError(
            f"drift: got layers {list(before.layer_ids)} of {before.num_experts} experts and {list(after.layer_ids)} "
            f"of {after.num_experts}, expected the same. Only profiles of one model can be compared."
        )
    before_LE, after_LE = before.scores_LE(score).double(), after.scores_LE(score).double()
    shared_L = shared_top_k(before_LE, after_LE, top)
    moved_L, divergence_L = moved_share(before_LE, after_LE), jensen_shannon(before_LE, after_LE)
    layers = tuple(
        LayerDrift(layer=layer, moved_share=moved, divergence=bits, num_shared_top=shared)
        for layer, moved, bits, shared in zip(
            before.layer_ids, moved_L.tolist(), divergence_L.tolist(), shared_L.tolist(), strict=True
        )
    )
    moves = [
        ExpertMove(layer=layer, expert=expert, before=float(before_LE[row, expert]), after=float(after_LE[row, expert]))
        for row, layer in enumerate(before.layer_ids)
        for expert in range(before.num_experts)
    ]
    moves.sort(key=lambda move: (-abs(move.change), move.layer, move.expert))
    return Drift(score=score, top=top, layers=layers, moves=tuple(moves[:num_moves]))


def moved_share(before_LE: Tensor, after_LE: Tensor) -> Tensor:
    """Total variation distance of each row's two distributions, (num_layers,), 0 to 1."""
    return (before_LE - after_LE).abs().sum(1) / 2


def jensen_shannon(before_LE: Tensor, after_LE: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each row's two distributions in bits, (num_layers,), 0 to 1.

        JS(p, q) = (KL(p, m) + KL(q, m)) / 2,  m = (p + q) / 2

    Source: Lin, Divergence measures based on the Shannon entropy, IEEE Transactions on Information Theory 37 (1991).
    """
    middle_LE = (before_LE + after_LE) / 2

    def divergence(part_LE: Tensor) -> Tensor:
        # 0 log 0 is 0; where the middle is 0, so is the part
        ratio_LE = torch.where(part_LE > 0, part_LE / middle_LE.clamp(min=1e-300), torch.ones_like(part_LE))
        return (part_LE * ratio_LE.log2()).sum(1)

    return (divergence(before_LE) + divergence(after_LE)) / 2
