"""Counts in blocks of sequences: what a profile's halves, and every resample of its data, are sums of.

Sequence i belongs to block i modulo the number of blocks, which is even: so even blocks are the even
sequences. Blocks, and not single sequences, because memory then does not grow with the data.
"""

# G blocks (groups of sequences), H halves, L MoE layers, E experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metier.routing.counter import RoutingCounter, halves
from metier.routing.routing_profile import RoutingProfile


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockCounts:
    """What `RoutingProfile` holds for two halves, for more blocks of the same sequences."""

    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    token_counts_GLE: Tensor
    """int64, (num_blocks, num_layers, num_experts)."""
    gate_mass_GLE: Tensor
    """float64, (num_blocks, num_layers, num_experts)."""
    output_norm_GLE: Tensor | None
    num_tokens_G: Tensor
    """int64, (num_blocks,)."""
    meta: dict[str, str] = field(default_factory=dict)

    @classmethod
    def counted(
        cls,
        counter: RoutingCounter,
        *,
        layer_ids: tuple[int, ...],
        num_experts: int,
        top_k: int,
        num_tokens_G: Tensor,
        meta: dict[str, str],
        over: Callable[[Tensor], Tensor] | None = None,
    ) -> BlockCounts:
        """What `counter` has counted so far; `over` adds what other processes' counters have."""
        sums = (counter.token_counts_GLE(), counter.gate_mass_GLE(), counter.output_norm_GLE())
        counts_GLE, mass_GLE, norm_GLE = (None if x is None else x if over is None else over(x) for x in sums)
        assert counts_GLE is not None, "counted always"
        assert mass_GLE is not None, "counted always"
        return cls(
            layer_ids=layer_ids,
            num_experts=num_experts,
            top_k=top_k,
            token_counts_GLE=counts_GLE,
            gate_mass_GLE=mass_GLE,
            output_norm_GLE=norm_GLE,
            num_tokens_G=num_tokens_G,
            meta=meta,
        )

    def profile(self, times_G: Tensor | None = None) -> RoutingProfile:
        """The profile of all blocks, or of a resample.

        Args:
            times_G: how often each block is in the resample, int64, (num_blocks,); None for once each.
        """
        times_G = torch.ones_like(self.num_tokens_G) if times_G is None else times_G
        times_G11 = times_G[:, None, None]
        even, odd = (int((times_G * self.num_tokens_G)[half::2].sum()) for half in (0, 1))
        return RoutingProfile(
            layer_ids=self.layer_ids,
            num_experts=self.num_experts,
            top_k=self.top_k,
            token_counts_HLE=halves(self.token_counts_GLE * times_G11),
            gate_mass_HLE=halves(self.gate_mass_GLE * times_G11),
            output_norm_HLE=None if self.output_norm_GLE is None else halves(self.output_norm_GLE * times_G11),
            num_tokens_H=(even, odd),
            meta=dict(self.meta),
        )
