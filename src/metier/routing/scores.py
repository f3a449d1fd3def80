"""The scores by which experts are ranked, from what was counted.

The published ESFT script divides by sums over layers (`axis=0`), and its gate scores are only comparable on
models that do not renormalise their gates. The scores here are normalised over the experts of one layer, so
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


def output_norm_score_LE(output_norm_LE: Tensor) -> Tensor:
    """Share of what a layer's experts added to the hidden states, by length.

        n_le = norm_le / sum_e norm_le,   norm_le = sum over routed tokens of |weight| * ||output of e||

    A gate says how much of an expert is let through, not how much there is. This score counts both. Pruning
    work (REAP) ranks experts by the mean of the same product over an expert's own tokens; we take the sum,
    because an expert that a task rarely uses is not worth training, however strongly it answers.

    Args:
        output_norm_LE: sum of the weighted outputs' norms, float64, (num_layers, num_experts).

    Returns:
        float64, (num_layers, num_experts), rows sum to 1.

    Raises:
        SelectionError: a layer received nothing.
    """
    return _normalised(output_norm_LE)


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
    return _mean_a_token(gate_mass_LE, num_tokens)


def raw_output_norm_LE(output_norm_LE: Tensor, *, num_tokens: int) -> Tensor:
    """Mean length of what an expert added to a token: in units of the hidden state, so it grows with depth.

    Args:
        output_norm_LE: sum of the weighted outputs' norms, float64, (num_layers, num_experts).
        num_tokens: tokens that were counted, at least 1.

    Returns:
        float64, (num_layers, num_experts).
    """
    return _mean_a_token(output_norm_LE, num_tokens)


def positive_share_LE(difference_LE: Tensor) -> Tensor:
    """Scores minus general scores, negatives set to 0, each row divided by its sum.

        d_le = max(task_le - general_le, 0) / sum_e max(task_le - general_le, 0)

    `top_p` is a share of something, and a layer's differences sum to 0: so the share is of what the task uses
    more than general data do. An expert that it uses less has nothing to add to that sum, nor to take away
    from it; clipped, it comes last. Policies that only rank need no share and take the plain differences,
    where the order among the negative ones is kept. Without the division a layer in which the task is unlike
    general data would need few experts for `top_p`, and one in which it is like them could never cover it.

    Args:
        difference_LE: task minus general scores, float64, (num_layers, num_experts).

    Returns:
        float64, (num_layers, num_experts), rows sum to 1.

    Raises:
        SelectionError: a layer where no expert scores higher on the task.
    """
    positive_LE = difference_LE.clamp(min=0)
    totals_L1 = positive_LE.sum(dim=1, keepdim=True)
    if bool((totals_L1 <= 0).any()):
        same = int((totals_L1 <= 0).flatten().nonzero()[0])
        raise SelectionError(
            f"row {same}: no expert of this layer scores higher on the task than in general, so there is no "
            f"share to cover.\nProfile general data that differ from the task's, or leave minus_general out."
        )
    return positive_LE / totals_L1


def _mean_a_token(values_LE: Tensor, num_tokens: int) -> Tensor:
    if num_tokens < 1:
        raise SelectionError(f"num_tokens: got {num_tokens}, expected at least 1; profile the model first.")
    return values_LE.to(torch.float64) / num_tokens


def _normalised(values_LE: Tensor) -> Tensor:
    totals_L1 = values_LE.to(torch.float64).sum(dim=1, keepdim=True)
    if bool((totals_L1 <= 0).any()):
        empty = int((totals_L1 <= 0).flatten().nonzero()[0])
        raise SelectionError(
            f"row {empty}: this layer counted no token at all, so its experts have no scores.\n"
            f"Profile the model on more tokens."
        )
    return values_LE.to(torch.float64) / totals_L1
