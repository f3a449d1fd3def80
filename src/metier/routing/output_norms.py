"""How long each expert's weighted output is: what the output_norm score is made of.

The experts contract gives only the sum over a token's slots. So the experts are called once more for each
slot alone: `experts(hidden_states_TD, expert_ids_T1, routing_weights_T1)` is that slot's weighted output,
whatever the family computes inside (biases, clamps, norms, an adapter), and the original call is not
disturbed. It costs the experts' part of the forward pass a second time, in memory no more than the original
call took.
"""

# T tokens, D hidden_size, K top_k

from __future__ import annotations

import torch
from torch import Tensor, nn


def output_norms_TK(
    entry: nn.Module,
    hidden_states_TD: Tensor,
    expert_ids_TK: Tensor,
    routing_weights_TK: Tensor,
    *,
    num_experts: int,
) -> Tensor:
    """Norms of the weighted outputs of all slots.

        norm_tk = || weight_tk * expert_tk(hidden_t) ||

    Args:
        entry: what the model calls for a layer's experts; its hooks are not run.
        hidden_states_TD: the experts' input, (num_tokens, hidden_size).
        expert_ids_TK: chosen experts, any integer dtype, (num_tokens, top_k); ids from num_experts on are
            slots that reached no expert.
        routing_weights_TK: their weights, (num_tokens, top_k).
        num_experts: routed experts of the layer.

    Returns:
        float32, (num_tokens, top_k); 0 for slots that reached no expert.
    """
    norms_TK = torch.zeros(expert_ids_TK.shape, dtype=torch.float32, device=hidden_states_TD.device)
    for slot in range(expert_ids_TK.shape[1]):
        reached = (expert_ids_TK[:, slot] < num_experts).nonzero().flatten()
        if reached.numel() == 0:
            continue
        one_slot = slice(slot, slot + 1)
        # forward, not the call: a hook on the entry would see tokens that the model never routed
        output_TD: Tensor = entry.forward(
            hidden_states_TD[reached], expert_ids_TK[reached, one_slot], routing_weights_TK[reached, one_slot]
        )
        norms_TK[reached, slot] = torch.linalg.vector_norm(output_TD.float(), dim=-1)
    return norms_TK
