"""A gate on what an adapter does: one number in (0, 1) a token, a linear map of what the adapter reads.

Paper: UniPELT, arXiv:2110.07577. The paper's code averages the gate over the sequence; in a causal model that would
show a token what comes after it, and in generation the average would change with every token. So every token has its
own gate here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metier.methods.block_layer import computed

GATE_STD = 0.02
"""Of a gate's weights as they begin, as in the published code: a fresh gate is about one half."""


def new_gate(width: int, device: torch.device) -> nn.Linear:
    """A gate that reads tokens of `width` features."""
    gate = nn.Linear(width, 1, device=device)
    with torch.no_grad():
        gate.weight.normal_(std=GATE_STD)
        gate.bias.zero_()
    return gate


def gate_values(gate: nn.Module, hidden: Tensor) -> Tensor:
    """The gate of every token, (…, width) to (…, 1), in the dtype of `hidden`."""
    return computed(gate, hidden).sigmoid()
