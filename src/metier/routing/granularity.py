"""Granularity: what if experts were coarser? Experts that work together are grouped, and selected as one.

The ESFT paper simulates coarse experts this way (arXiv:2407.01906, figure 7): groups are built greedily from how alike
two experts' company is, and a group is trained or left as a whole.
"""

# T tokens, K top_k, E experts, G groups

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metier.errors import SelectionError
from metier.routing.policy import pick_experts

Groups = tuple[tuple[int, ...], ...]
"""Experts that count as one, each in exactly one group, ids ascending."""


def coactivation_EE(expert_ids_TK: Tensor, *, num_experts: int) -> Tensor:
    """How many tokens chose both of two experts; the diagonal holds how many chose each.

    Args:
        expert_ids_TK: chosen experts, any integer dtype, (num_tokens, top_k); a token names an expert at most once.
        num_experts: routed experts of the layer.

    Returns:
        float64, (num_experts, num_experts), symmetric.
    """
    counts_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for ids_TK in expert_ids_TK.split(65_536):
        chosen_TE = torch.zeros(len(ids_TK), num_experts, dtype=torch.float64)
        chosen_TE.scatter_(1, ids_TK.long(), 1.0)
        counts_EE += chosen_TE.T @ chosen_TE
    return counts_EE


def group_experts(coactivation_EE: Tensor, *, group_size: int) -> Groups:
    """Groups of experts that are chosen together, greedily.

    Again and again the busiest expert that is left founds a group, which is filled up with the experts whose rows of
    the co-activation matrix have the highest cosine with the sum of the group's rows; ties break by expert id.

    Args:
        coactivation_EE: from `coactivation_EE`.
        group_size: experts of a group; divides their number.

    Raises:
        SelectionError: the groups do not come out even.

    Paper: ESFT, arXiv:2407.01906, section 6.3 (greedy, by cosine); it does not say where a group begins.
    """
    num_experts = len(coactivation_EE)
    if group_size < 1 or num_experts % group_size:
        raise SelectionError(f"group_size: got {group_size}, expected a divisor of the {num_experts} experts.")
    load_E = coactivation_EE.diagonal().clone()
    company_EE = coactivation_EE - torch.diag(load_E)
    left, groups = set(range(num_experts)), []
    while left:
        group = [min(left, key=lambda expert: (-float(load_E[expert]), expert))]
        left.remove(group[0])
        while len(group) < group_size:
            cosine_E = torch.nn.functional.cosine_similarity(company_EE, company_EE[group].sum(0, keepdim=True))
            best = min(left, key=lambda expert: (-float(cosine_E[expert]), expert))
            group.append(best)
            left.remove(best)
        groups.append(tuple(sorted(group)))
    return tuple(groups)


def pick_groups(scores: Sequence[float], groups: Groups, *, top_p: float) -> tuple[int, ...]:
    """One layer's experts of the groups that cover `top_p`, a group's score being the sum of its experts'.

    Args:
        scores: one non-negative score an expert; they should sum to 1.
        groups: every expert in exactly one of them.
        top_p: share to cover, in (0, 1]; the group that crosses it is included.

    Returns:
        Expert ids, group by group in order of falling score.

    Raises:
        SelectionError: an expert is in no group or in two, or the scores are not numbers.
    """
    named = sorted(expert for group in groups for expert in group)
    if named != list(range(len(scores))):
        raise SelectionError(
            f"groups: got experts {named}, expected each of the {len(scores)} experts of the scores in one group."
        )
    totals = [sum(scores[expert] for expert in group) for group in groups]
    return tuple(expert for group in pick_experts(totals, top_p=top_p) for expert in groups[group])
