"""Switch Transformers' MoE blocks, made to follow transformers' experts contract.

Transformers keeps each expert as a module of its own and tells the experts who gets which token by a mask. Here the
experts' weights are stacked; a token that found its expert full gets a routing weight of 0, as it got nothing before.
The state dict keeps one tensor an expert under its old name, so checkpoints are read and written as before.

Departure: the dropout between an expert's two products is left out, for the contract has no place for it. Outside
training nothing differs.
"""

# B sequences, S tokens of one, T = B * S, D hidden_size, F moe_intermediate_size, E experts, K top_k

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

_STACKED = {"up_proj": "wi.weight", "down_proj": "wo.weight"}


class SwitchExperts(nn.Module):
    """Experts of the contract in place of transformers' `SwitchTransformersExperts`."""

    def __init__(self, experts: Any, config: object) -> None:
        super().__init__()
        self.config = config
        self.num_experts = experts.num_experts
        self.act_fn = experts["expert_0"].act
        for name, old_name in _STACKED.items():
            rows = [expert.get_parameter(old_name) for expert in experts.values()]
            stack = torch.stack([row.detach() for row in rows])
            setattr(self, name, nn.Parameter(stack, requires_grad=rows[0].requires_grad))
        self.has_gate = self.has_bias = self.has_post_expert_norm = self.is_transposed = False
        self.is_concatenated = True
        self._is_expert_parallel = False
        self.register_state_dict_post_hook(_part)
        self.register_load_state_dict_pre_hook(_stack)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), (T, K) int64, (T, K) → (T, D)."""
        out_TD: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return out_TD


class SwitchMoe(nn.Module):
    """The block as transformers has it, but for the call of its experts."""

    top_k = 1

    def __init__(self, path: str, block: Any) -> None:
        super().__init__()
        self.router = block.router
        self.experts = SwitchExperts(block.experts, None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D); an expert's capacity counts per sequence."""
        dispatch_BSE, weights_BSK, router_logits_BSE = self.router(hidden_states)
        is_kept_BSK = dispatch_BSE.any(-1, keepdim=True)
        chosen_BSK = dispatch_BSE.argmax(-1, keepdim=True)
        # an all-zero mask does not say which expert was full
        expert_ids_BSK = torch.where(is_kept_BSK, chosen_BSK, router_logits_BSE.argmax(-1, keepdim=True))
        out_TD = self.experts(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            expert_ids_BSK.reshape(-1, self.top_k),
            (weights_BSK * is_kept_BSK).reshape(-1, self.top_k),
        )
        routed_BSD: Tensor = out_TD.view_as(hidden_states)
        return routed_BSD


def _part(experts: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Into one tensor an expert, each a view of the stack, in transformers' order."""
    stacks = {old_name: state.pop(f"{prefix}{name}") for name, old_name in _STACKED.items()}
    for index in range(len(next(iter(stacks.values())))):
        for old_name, stack in stacks.items():
            state[f"{prefix}expert_{index}.{old_name}"] = stack[index]


def _stack(experts: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    num_experts = experts.num_experts
    assert isinstance(num_experts, int), "set by SwitchExperts"
    for name, old_name in _STACKED.items():
        old_names = [f"{prefix}expert_{index}.{old_name}" for index in range(num_experts)]
        if all(old in state for old in old_names):  # else torch reports the stack as missing
            state[f"{prefix}{name}"] = torch.stack([state.pop(old) for old in old_names])
