"""The two scores of ESFT, from what was counted; each row is one layer and sums to 1.

The published ESFT script divides by sums over layers (`axis=0`), and its gate scores are only comparable on
models that do not renormalise their gates. Both scores here are normalised over the experts of one layer, so
that one `top_p` means the same on every model. `raw_gate_score_LE` gives the paper's own gate scale.
"""

# L MoE layers, E experts

from __future__ import annotations

import torch
from torch import Tensor

from metier.errors import SelectionError


def token_ratio_LE(token_counts_LE: Tensor) -> Tensor:
    """Share of a layer's routing slots that each expert received.

        r_le = count_le / sum_e count_le

    The denominator is tokens times top_k wherever every slot goes to an expert.

    Args:
        token_counts_LE: slots an expert received, int64, (num_layers, num_experts).

    Returns:
        float64, (num_layers, num_experts), rows sum to 1.

    Raises:
        SelectionError: a layer received nothing.

    Paper: ESFT, arXiv:2407.01906, "token selection ratio".
    """
    return _normalised(token_counts_LE)


def gate_score_LE(gate_mass_LE: Tensor) -> Tensor:
    """Share of a layer's gate mass that each expert received.

        g_le = mass_le / sum_e mass_le

    We depart from the paper, which divides by the number of tokens: on models that do not renormalise the
    gates of the chosen experts that scale differs by model (DeepSeek-V2-Lite gives away 0.39 a token), so the
    same `top_p` would select nearly all experts on one model and few on another. A constant scaling factor of
    the router cancels.

    Args:
        gate_mass_LE: sum of routing weights, float64, (num_layers, num_experts).

    Returns:
        float64, (num_layers, num_experts), rows sum to 1.

    Raises:
        SelectionError: a layer received nothing.

    Paper: ESFT, arXiv:2407.01906, "average gate score", normalised.
    """
    return _normalised(gate_mass_LE)


def raw_gate_score_LE(gate_mass_LE: Tensor, *, num_tokens: int) -> Tensor:
    """Mean routing weight that a token gave each expert: the paper's own scale.

        g_le = mass_le / num_tokens

    Rows sum to 1 where the router renormalises, to less where it does not, and to the router's scaling factor
    times that where it has one (`routed_scaling_factor` in the DeepSeek family): weights are taken as the
    experts get them.

    Args:
        gate_mass_LE: sum of routing weights, float64, (num_layers, num_experts).
        num_tokens: tokens that were counted, at least 1.

    Returns:
        float64, (num_layers, num_experts).

    Paper: ESFT, arXiv:2407.01906, "average gate score", with one sample of all tokens.
    """
    if num_tokens < 1:
        raise SelectionError(f"num_tokens: got {num_tokens}, expected at least 1; profile the model first.")
    return gate_mass_LE.to(torch.float64) / num_tokens


def _normalised(values_LE: Tensor) -> Tensor:
    totals_L1 = values_LE.to(torch.float64).sum(dim=1, keepdim=True)
    if bool((totals_L1 <= 0).any()):
        empty = int((totals_L1 <= 0).flatten().nonzero()[0])
        raise SelectionError(
            f"row {empty}: this layer counted no token at all, so its experts have no scores.\n"
            f"Profile the model on more tokens."
        )
    return values_LE.to(torch.float64) / totals_L1
