"""Llama 4's MoE blocks, made to follow transformers' experts contract.

Transformers runs every expert of Llama 4 on every token, on inputs that the router has scaled (to zero where it did
not choose). The contract wants a token's hidden states and the ids of its experts. With one expert a token, as in all
of Llama 4, the two say the same: the scaled input, one id, and a routing weight of 1. What is computed for the tokens
that an expert was not chosen for is zero, and is no longer computed.

Parameters and their names stay, so checkpoints are read and written as before.
"""

# T tokens, D hidden_size, E experts, K top_k

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

from metier.errors import UnsupportedModelError


class Llama4Experts(nn.Module):
    """Experts of the contract over the stacked parameters of transformers' `Llama4TextExperts`."""

    def __init__(self, stacked: Any, config: object) -> None:
        super().__init__()
        self.config = config
        self.num_experts = stacked.num_experts
        self.gate_up_proj, self.down_proj = stacked.gate_up_proj, stacked.down_proj
        self.act_fn = stacked.act_fn
        self.has_gate = self.is_transposed = self.is_concatenated = True
        self.has_bias = self.has_post_expert_norm = False
        self._is_expert_parallel = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), (T, K) int64, (T, K) → (T, D)."""
        out_TD: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return out_TD

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        inner: Tensor = up * self.act_fn(gate)
        return inner


class Llama4Moe(nn.Module):
    """The block as transformers has it, but for the call of its experts."""

    def __init__(self, path: str, block: Any) -> None:
        super().__init__()
        if block.top_k != 1:
            raise UnsupportedModelError(
                f"{path}: got top_k={block.top_k}, but metier works on Llama 4 with one expert a token, whose input "
                "its router scales.\nLoad a model with num_experts_per_tok=1, as all published ones have."
            )
        self.top_k = block.top_k
        # in transformers' order, which is that of the checkpoint's tensors
        self.experts = Llama4Experts(block.experts, block.shared_expert.config)
        self.router, self.shared_expert = block.router, block.shared_expert

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Any shape ending in D → the experts' output (T, D), and router logits (T, E)."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE, router_logits_TE = self.router(hidden_TD)
        expert_ids_TK = router_logits_TE.topk(self.top_k, dim=-1).indices
        scaled_TD = hidden_TD * scores_TE.gather(-1, expert_ids_TK)
        routed_TD = self.experts(scaled_TD, expert_ids_TK, torch.ones_like(scores_TE[:, : self.top_k]))
        return self.shared_expert(hidden_TD) + routed_TD, router_logits_TE
