"""Count what the router did: slots and gate mass, by layer and expert, in two halves.

The counts of even and odd sequences are kept apart, so that every profile can say how reliable it is. Routing
weights are rounded to multiples of 2^-26 (a quarter of float32's step just below 1) before they are added:
sums of such numbers are exact in float64 up to 2^27 a layer and expert, however small the smallest weight, so
neither the batch size nor the order changes a bit of the result, and profiles merge exactly.
"""

# T tokens, E experts, K top_k, L MoE layers, H halves (even and odd sequences)

from __future__ import annotations

import torch
from torch import Tensor

_STEPS_PER_UNIT = float(2**26)


class RoutingCounter:
    """Adds up expert ids and routing weights, batch by batch, on the device where they are."""

    def __init__(self, *, num_layers: int, num_experts: int) -> None:
        self._num_experts = num_experts
        # one more column than experts: routers may send a slot to no expert, with an id past the last one
        self._counts: list[Tensor | None] = [None] * num_layers
        self._steps: list[Tensor | None] = [None] * num_layers

    def add(self, position: int, expert_ids_TK: Tensor, routing_weights_TK: Tensor, half_T: Tensor) -> None:
        """Count one call of the layer at `position`.

        Args:
            position: of the layer among the counted ones.
            expert_ids_TK: chosen experts, any integer dtype, (num_tokens, top_k); ids from num_experts on are
                slots that reached no expert and are not counted.
            routing_weights_TK: their weights as the experts get them, any floating dtype,
                (num_tokens, top_k).
            half_T: 0 or 1, int64, (num_tokens,): the half that the token's sequence belongs to.
        """
        if expert_ids_TK.device.type == "mps":  # has no float64
            expert_ids_TK, routing_weights_TK = expert_ids_TK.cpu(), routing_weights_TK.cpu()
        num_bins = self._num_experts + 1
        half_T1 = half_T.to(expert_ids_TK.device)[:, None]
        bins = (expert_ids_TK.long().clamp(max=self._num_experts) + half_T1 * num_bins).flatten()
        steps = routing_weights_TK.detach().to(torch.float64).mul(_STEPS_PER_UNIT).round_().flatten()
        counts = torch.bincount(bins, minlength=2 * num_bins)
        # without a single token, bincount forgets the weights' dtype
        sums = torch.bincount(bins, weights=steps, minlength=2 * num_bins).to(torch.float64)
        counted, summed = self._counts[position], self._steps[position]
        self._counts[position] = counts if counted is None else counted.add_(counts)
        self._steps[position] = sums if summed is None else summed.add_(sums)

    def token_counts_HLE(self) -> Tensor:
        """int64, (2, num_layers, num_experts), on the CPU."""
        return self._collect(self._counts, torch.int64)

    def gate_mass_HLE(self) -> Tensor:
        """float64, (2, num_layers, num_experts), on the CPU."""
        return self._collect(self._steps, torch.float64) / _STEPS_PER_UNIT

    def _collect(self, parts: list[Tensor | None], dtype: torch.dtype) -> Tensor:
        num_bins = self._num_experts + 1
        rows = [torch.zeros(2 * num_bins, dtype=dtype) if part is None else part.cpu() for part in parts]
        return torch.stack(rows).view(len(parts), 2, num_bins)[:, :, :-1].transpose(0, 1).contiguous()
