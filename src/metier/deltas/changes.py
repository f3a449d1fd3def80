"""The rows that a base has once a delta is merged: replaced by the delta's, or with its low-rank changes added."""

# k selected experts of a layer, C the same of a low-rank delta

from __future__ import annotations

import torch
from torch import Tensor

from metier.deltas.format import EXPERT_LORA
from metier.deltas.read import Delta
from metier.models.moe import MoELayer

Rows = dict[int, dict[str, Tensor]]


def changed_parameters(delta: Delta, layer: MoELayer) -> tuple[str, ...]:
    """The stacked parameters of a selected layer that the delta changes."""
    names = layer.parameter_names()
    return names if delta.config.method != EXPERT_LORA else tuple(n for n in names if not n.endswith("_bias"))


def merged_rows(delta: Delta, rows: Rows, layer: MoELayer, name: str) -> Tensor:
    """What the selected experts' rows of one stacked parameter are after a merge, (k, …) in the base's dtype.

    Args:
        delta: one that fits the base.
        rows: of `delta.load_rows()`.
        layer: of the base, with the base's own rows in it.
        name: one of `changed_parameters`.
    """
    ids = list(delta.config.experts[layer.index])
    weight = getattr(layer.experts, name).detach()
    if delta.config.method != EXPERT_LORA:
        return rows[layer.index][name].to(weight)
    change = low_rank_change(delta, rows, layer, name).to(weight.device)
    merged: Tensor = (weight[ids].float() + change).to(weight.dtype)
    return merged


def low_rank_change(delta: Delta, rows: Rows, layer: MoELayer, name: str) -> Tensor:
    """`scale * B A` of each changed expert, float32, (C, …) in the layout of the base's stacked parameter."""
    settings = delta.config.low_rank
    assert settings is not None, "read_delta reads the settings of a low-rank delta"
    side = "down" if name == "down_proj" else "up"
    a, b = (rows[layer.index][f"{side}_{letter}"].float() for letter in "AB")
    scales = [settings.scale(layer.index, expert) for expert in delta.config.experts[layer.index]]
    change: Tensor = torch.tensor(scales).view(-1, 1, 1) * (b @ a)
    return change.mT if layer.is_transposed else change
