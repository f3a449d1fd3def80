"""One selection out of several tasks' selections: what any of them uses, or what all of them use.

Results name layers and experts in rising order: the order by score, which single selections have, means
nothing between tasks. So combining is free of order and grouping, and doing it twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from metier.errors import SelectionError
from metier.routing.expert_selection import ExpertSelection


def union_selection(selections: Sequence[ExpertSelection]) -> ExpertSelection:
    """Every expert that one of `selections` names; shared experts and other modules if one trains them.

    For one adapter that serves all the tasks.

    Raises:
        SelectionError: no selection, or selections of models with different numbers of experts.
    """
    _check(selections)
    layers = sorted({layer for selection in selections for layer in selection.experts})
    return ExpertSelection(
        experts={
            layer: tuple(sorted({expert for s in selections for expert in s.experts.get(layer, ())}))
            for layer in layers
        },
        shared_experts=any(selection.shared_experts for selection in selections),
        non_expert_modules=any(selection.non_expert_modules for selection in selections),
        num_experts=_num_experts(selections),
    )


def intersection_selection(selections: Sequence[ExpertSelection]) -> ExpertSelection:
    """Every expert that all of `selections` name; shared experts and other modules if all train them.

    For what the tasks have in common. A layer in which they share no expert is left out.

    Raises:
        SelectionError: no selection, selections of models with different numbers of experts, or nothing in
            common.
    """
    _check(selections)
    layers = sorted({layer for selection in selections for layer in selection.experts})
    common = {layer: set.intersection(*(set(s.experts.get(layer, ())) for s in selections)) for layer in layers}
    shared_experts = all(selection.shared_experts for selection in selections)
    non_expert_modules = all(selection.non_expert_modules for selection in selections)
    if not any(common.values()) and not shared_experts and not non_expert_modules:
        raise SelectionError(
            f"intersection: the {len(selections)} selections have no expert in common, so nothing is left to "
            f"train.\nSelect more experts for each task, or take the union."
        )
    return ExpertSelection(
        experts={layer: tuple(sorted(experts)) for layer, experts in common.items() if experts},
        shared_experts=shared_experts,
        non_expert_modules=non_expert_modules,
        num_experts=_num_experts(selections),
    )


def _check(selections: Sequence[ExpertSelection]) -> None:
    if not selections:
        raise SelectionError("selections: got none, expected at least one to combine.\nPass each task's selection.")
    numbers = sorted({s.num_experts for s in selections if s.num_experts is not None})
    if len(numbers) > 1:
        raise SelectionError(
            f"num_experts: got selections of models with {' and '.join(map(str, numbers))} experts a layer, "
            f"expected one model.\nCombine selections that were made for the same model."
        )


def _num_experts(selections: Sequence[ExpertSelection]) -> int | None:
    return next((s.num_experts for s in selections if s.num_experts is not None), None)
