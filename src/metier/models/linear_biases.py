"""Whether a base's architecture can hold biases on linear layers that have none, and how it is told to.

Some families read a switch (`attention_bias`, `mlp_bias` …) from their configuration. Which switch gives which biases
differs, so the model class itself is asked: it is built without weights, with the switches on.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from metier.errors import DeltaError
from metier.models.base_parameters import base_modules, base_parameters
from metier.models.unwrap import bare_model

SWITCHES = ("attention_bias", "mlp_bias", "qkv_bias", "o_bias", "use_bias")


def switches_for_biases(model: nn.Module, paths: Collection[str]) -> tuple[str, ...]:
    """The switches of the base's configuration that give it the biases `paths`, each only where it helps.

    Raises:
        DeltaError: the architecture has no room for one of them; names it.
    """
    bare = bare_model(model)
    config = getattr(bare, "config", None)
    chosen: list[str] = []
    missing = set(paths)
    for switch in (name for name in SWITCHES if getattr(config, name, None) is False):
        given = _parameters_with(bare, [*chosen, switch]) if missing else set()
        if missing & given:
            chosen.append(switch)
            missing -= given
    if missing:
        raise DeltaError(
            f"{min(missing)}: the adapter adds a bias here, and {type(bare).__name__} has no place for one "
            f"({len(missing)} of {len(paths)} added biases), so it cannot be merged. Serve it beside its base."
        )
    return tuple(chosen)


def take_biases(model: nn.Module, switches: Collection[str]) -> None:
    """Turn switches on in the configuration, and give a bias of 0 to every linear layer that lacks one by them."""
    bare = bare_model(model)
    wanted, modules = _parameters_with(bare, switches), dict(base_modules(bare))
    for switch in switches:
        setattr(bare.config, switch, True)
    for path in sorted(wanted - {found.path for found in base_parameters(bare)}):
        owner = modules[path.rpartition(".")[0]]
        weight = owner.weight
        assert isinstance(weight, torch.Tensor), f"{path} belongs to a linear layer"
        owner.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)


def _parameters_with(bare: nn.Module, switches: Collection[str]) -> set[str]:
    config = copy.deepcopy(bare.config)
    for switch in switches:
        setattr(config, switch, True)
    with torch.device("meta"):
        return {name for name, _ in type(bare)(config).named_parameters(remove_duplicate=False)}
