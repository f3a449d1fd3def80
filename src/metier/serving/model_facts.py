"""What a server has to know of its base to judge a delta: taken once, before the engine puts anything around layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.fingerprint import fingerprint_of_any
from metier.models.moe import MoELayer, is_dense, moe_layers

SERVED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What the base's weights may be in where a delta changes them."""


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """A linear layer of the base."""

    shape: tuple[int, int]
    """(out, in)"""
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """A base without its weights."""

    name: str
    """What people call it, for errors."""
    fingerprint: str
    layers: tuple[MoELayer, ...]
    """Its MoE layers, whose parameters have shape and dtype but no values; none where it is dense."""
    linears: dict[str, LinearFacts]
    """By module path. None of them is quantised."""


def model_facts(model: nn.Module, name: str) -> ModelFacts:
    """The facts of a base that is loaded and has nothing around its layers yet.

    Args:
        model: a transformers model, bare.
        name: what people call it.

    Raises:
        UnsupportedModelError: as `moe_layers`, for one with MoE layers outside the contract; or its experts are
            quantised.
    """
    layers = [] if is_dense(model) else moe_layers(model)
    return ModelFacts(
        name=name,
        fingerprint=fingerprint_of_any(model),
        layers=tuple(_without_values(layer) for layer in layers),
        linears={
            path: LinearFacts((module.out_features, module.in_features), module.weight.dtype)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.dtype in SERVED_DTYPES
        },
    )


def _without_values(layer: MoELayer) -> MoELayer:
    """The same layer, which keeps no memory of the base alive and does not change with it."""
    shapes = nn.Module()
    for name in layer.parameter_names():
        parameter = getattr(layer.experts, name)
        if parameter.dtype not in SERVED_DTYPES:
            raise UnsupportedModelError(
                f"{layer.path}.{name}: got {parameter.dtype}, expected one of {', '.join(map(str, SERVED_DTYPES))}.\n"
                "Deltas are served on a base that is not quantised; load it without quantisation."
            )
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        shapes.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return replace(layer, experts=shapes, entry=shapes)
