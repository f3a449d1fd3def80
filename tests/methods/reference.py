"""Experts as plain loops over tokens and slots: slow, obvious, and what every fast path is compared with."""

# T tokens, D hidden_size, K top_k

from __future__ import annotations

import torch
from torch import Tensor

from metier.methods.virtual_experts import Activation, ExpertBank


def reference_experts(
    hidden_TD: Tensor,
    virtual_ids_TK: Tensor,
    weights_TK: Tensor,
    banks: list[ExpertBank],
    activation: Activation,
    is_transposed: bool,
    output_norm: Activation | None = None,
) -> Tensor:
    """Every token's slots one by one, each with its own expert's matrices; gradients by autograd alone."""
    rows = [(bank, expert) for bank in banks for expert in range(bank.up.shape[0])]
    outputs = []
    for token, hidden_D in enumerate(hidden_TD):
        total_D = torch.zeros_like(hidden_D)
        for slot, virtual_id in enumerate(virtual_ids_TK[token].tolist()):
            bank, expert = rows[virtual_id]
            up, down = bank.up[expert], bank.down[expert]
            if is_transposed:
                up, down = up.T, down.T
            inner = up @ hidden_D
            if bank.up_bias is not None:
                inner = inner + bank.up_bias[expert]
            out_D = down @ activation(inner.unsqueeze(0)).squeeze(0)
            if bank.down_bias is not None:
                out_D = out_D + bank.down_bias[expert]
            if output_norm is not None:
                out_D = output_norm(out_D.unsqueeze(0)).squeeze(0)
            total_D = total_D + weights_TK[token, slot] * out_D
        outputs.append(total_D)
    return torch.stack(outputs)
