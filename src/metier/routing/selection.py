"""From a profile to a selection, with the settings of a `SelectionConfig`.

The four rooms around it: `selection_config` says what can be asked for, `policy` and `budget` decide,
`expert_selection` is the result; `combine` and `controls` make selections from selections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from metier.errors import SelectionError
from metier.models.moe import moe_layers
from metier.routing.combine import intersection_selection, union_selection
from metier.routing.controls import coldest_selection, random_selection
from metier.routing.expert_selection import ExpertSelection
from metier.routing.policy import SelectionConfig

if TYPE_CHECKING:
    from metier.routing.routing_profile import RoutingProfile

__all__ = [
    "ExpertSelection",
    "SelectionConfig",
    "coldest_selection",
    "expert_bytes",
    "intersection_selection",
    "random_selection",
    "select",
    "union_selection",
]


def select(
    profile: RoutingProfile,
    config: SelectionConfig,
    *,
    general: RoutingProfile | None = None,
    expert_bytes: Mapping[int, int] | None = None,
) -> ExpertSelection:
    """Pick the experts that a task uses: by falling score, as far as `config`'s policy goes.

    Ties break by expert id; with `top_p` the expert that crosses it is included.

    Args:
        profile: the task's.
        config: score and policy.
        general: profile of general data on the same model; if and only if `config.minus_general`.
        expert_bytes: bytes of one expert, by decoder layer, such as `expert_bytes(model)`; if and only if
            `config.budget_bytes`.

    Warns:
        UnreliableProfileWarning: the two halves of the profile select different experts with `config`.

    Raises:
        SelectionError: the profile counted nothing or lacks the score; `general` or `expert_bytes` is missing,
            not needed, or of another model; or the budget does not hold one expert.

    Paper: ESFT, arXiv:2407.01906, section 3. Its settings: token 0.2; gate 0.1 on its raw scale, see
    `metier.routing.scores` for ours.
    """
    picked = profile.picked(config, general=general, expert_bytes=expert_bytes)
    if not picked:
        raise _nothing_picked(profile, config, general, expert_bytes or {})
    profile.warn_if_unreliable(config, general=general, expert_bytes=expert_bytes)
    return ExpertSelection(experts=picked, num_experts=profile.num_experts)


def expert_bytes(model: nn.Module, *, bytes_per_parameter: int | None = None) -> dict[int, int]:
    """What one routed expert takes, by decoder layer.

    Args:
        model: the model, bare or wrapped by PEFT.
        bytes_per_parameter: None for the weights as the model holds them. What training takes is more: a
            float32 master, its gradient and AdamW's two moments are 16.

    Raises:
        UnsupportedModelError: as `moe_layers`.
    """
    sizes_bytes = {}
    for layer in moe_layers(model):
        stacks = [getattr(layer.experts, name) for name in layer.parameter_names()]
        sizes_bytes[layer.index] = sum(
            stack[0].numel() * (bytes_per_parameter or stack.element_size()) for stack in stacks
        )
    return sizes_bytes


def _nothing_picked(
    profile: RoutingProfile, config: SelectionConfig, general: RoutingProfile | None, sizes_bytes: Mapping[int, int]
) -> SelectionError:
    """Only a budget can leave every layer empty."""
    if float(profile.ranking_LE(config, general=general).max()) <= 0:
        return SelectionError(
            f"{config.policy_name}: no expert scores higher on the task than in general ({config.score_name}).\n"
            f"Profile general data that differ from the task's, or leave minus_general out."
        )
    low, high = min(sizes_bytes.values()), max(sizes_bytes.values())
    return SelectionError(
        f"{config.policy_name}: not even the first expert by {config.score_name} fits; one takes "
        f"{low if low == high else f'{low} to {high}'} bytes.\nRaise budget_bytes."
    )
