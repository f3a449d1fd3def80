"""The stacks of layers that a model is made of, from its outside alone."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

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
