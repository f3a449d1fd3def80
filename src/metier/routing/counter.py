"""Count what the router did: slots, gate mass and output norms, by layer and expert, in groups of sequences.

The counts of even and odd sequences are kept apart, so that every profile can say how reliable it is; with
more groups than two it can also be said how sure that is (`metier.routing.stability`). Even groups hold even
sequences.

What is added is first rounded to multiples of 2^-26 (for routing weights a quarter of float32's step just
below 1): sums of such numbers are exact in float64 up to 2^27 a layer and expert, however small the smallest
term, so neither the batch size nor the order changes a bit of the result, and profiles merge exactly.
"""

# T tokens, E experts, K top_k, L MoE layers, H halves (even and odd sequences), G groups of sequences

from __future__ import annotations

import torch
from torch import Tensor

_STEPS_PER_UNIT = float(2**26)


class RoutingCounter:
    """Adds up expert ids, routing weights and norms, batch by batch, on the device where they are."""

    def __init__(
        self, *, num_layers: int, num_experts: int, num_groups: int = 2, with_output_norms: bool = False
    ) -> None:
        assert num_groups % 2 == 0, f"groups alternate between the halves, got {num_groups}"
        self._num_experts = num_experts
        self._num_groups = num_groups
        # one more column than experts: routers may send a slot to no expert, with an id past the last one
        self._counts: list[Tensor | None] = [None] * num_layers
        self._mass_steps: list[Tensor | None] = [None] * num_layers
        self._norm_steps: list[Tensor | None] | None = [None] * num_layers if with_output_norms else None

    def add(
        self,
        position: int,
        expert_ids_TK: Tensor,
        routing_weights_TK: Tensor,
        group_T: Tensor,
        output_norms_TK: Tensor | None = None,
    ) -> None:
        """Count one call of the layer at `position`.

        Args:
            position: of the layer among the counted ones.
            expert_ids_TK: chosen experts, any integer dtype, (num_tokens, top_k); ids from num_experts on are
                slots that reached no expert and are not counted.
            routing_weights_TK: their weights as the experts get them, any floating dtype,
                (num_tokens, top_k).
            group_T: 0 to num_groups - 1, int64, (num_tokens,): the group that the token's sequence belongs
                to; with two groups, its half.
            output_norms_TK: norms of the slots' weighted outputs, any floating dtype, (num_tokens, top_k);
                there if and only if the counter was made `with_output_norms`.
        """
        assert (output_norms_TK is None) == (self._norm_steps is None), "output norms are counted always or never"
        if expert_ids_TK.device.type == "mps":  # has no float64
            expert_ids_TK, routing_weights_TK = expert_ids_TK.cpu(), routing_weights_TK.cpu()
            output_norms_TK = None if output_norms_TK is None else output_norms_TK.cpu()
        group_T1 = group_T.to(expert_ids_TK.device)[:, None]
        bins = (expert_ids_TK.long().clamp(max=self._num_experts) + group_T1 * (self._num_experts + 1)).flatten()
        _accumulate(self._counts, position, torch.bincount(bins, minlength=self._num_bins))
        _accumulate(self._mass_steps, position, self._steps(bins, routing_weights_TK))
        if self._norm_steps is not None and output_norms_TK is not None:
            _accumulate(self._norm_steps, position, self._steps(bins, output_norms_TK))

    def token_counts_GLE(self) -> Tensor:
        """int64, (num_groups, num_layers, num_experts), on the CPU."""
        return self._collect(self._counts, torch.int64)

    def gate_mass_GLE(self) -> Tensor:
        """float64, (num_groups, num_layers, num_experts), on the CPU."""
        return self._collect(self._mass_steps, torch.float64) / _STEPS_PER_UNIT

    def output_norm_GLE(self) -> Tensor | None:
        """float64, (num_groups, num_layers, num_experts), on the CPU; None where norms are not counted."""
        if self._norm_steps is None:
            return None
        return self._collect(self._norm_steps, torch.float64) / _STEPS_PER_UNIT

    def token_counts_HLE(self) -> Tensor:
        """The counts of even and odd sequences: int64, (2, num_layers, num_experts), on the CPU."""
        return halves(self.token_counts_GLE())

    def gate_mass_HLE(self) -> Tensor:
        """The gate mass of even and odd sequences: float64, (2, num_layers, num_experts), on the CPU."""
        return halves(self.gate_mass_GLE())

    @property
    def _num_bins(self) -> int:
        return self._num_groups * (self._num_experts + 1)

    def _steps(self, bins: Tensor, values_TK: Tensor) -> Tensor:
        steps = values_TK.detach().to(torch.float64).mul(_STEPS_PER_UNIT).round_().flatten()
        # without a single token, bincount forgets the weights' dtype
        return torch.bincount(bins, weights=steps, minlength=self._num_bins).to(torch.float64)

    def _collect(self, parts: list[Tensor | None], dtype: torch.dtype) -> Tensor:
        rows = [torch.zeros(self._num_bins, dtype=dtype) if part is None else part.cpu() for part in parts]
        shaped = torch.stack(rows).view(len(parts), self._num_groups, self._num_experts + 1)
        return shaped[:, :, :-1].transpose(0, 1).contiguous()


def halves(values_GLE: Tensor) -> Tensor:
    """Sums over the even groups and over the odd ones: (2, num_layers, num_experts)."""
    return torch.stack([values_GLE[0::2].sum(dim=0), values_GLE[1::2].sum(dim=0)])


def _accumulate(sums: list[Tensor | None], position: int, added: Tensor) -> None:
    before = sums[position]
    sums[position] = added if before is None else before.add_(added)
