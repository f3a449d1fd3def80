"""The stacks of layers that a model is made of, from its outside alone."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from metier.models.spellings import LAYER_INDEX
from metier.models.unwrap import original_module


def layer_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Every row of layers that transformers can checkpoint one by one; most models have one, encoder-decoders two.

    Args:
        model: bare or wrapped by a method.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and isinstance(original_module(module[0]), GradientCheckpointingLayer)
    ]


def layer_index(path: str) -> int | None:
    """The number of the layer that `path` itself names, such as 7 for `model.layers.7`; None where it names none."""
    found = list(LAYER_INDEX.finditer(f"{path}."))
    return int(found[-1].group(1)) if found and found[-1].end() == len(path) else None


def index_of_owner(path: str) -> int:
    """The number of the layer that the module at `path` lies in, such as 7 for `model.layers.7.mlp`; 0 in none."""
    found = list(LAYER_INDEX.finditer(f"{path}."))
    return int(found[-1].group(1)) if found else 0
