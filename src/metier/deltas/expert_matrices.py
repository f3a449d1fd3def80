"""From the base's stacked rows to the single matrices of each expert, as checkpoints name them, and back.

A checkpoint of most families has `gate_proj`, `up_proj` and `down_proj` of each expert, as `nn.Linear` stores them:
`(out, in)`. transformers stacks them over the experts, gate and up in one tensor: one after the other, or (gpt_oss) row
by row in turn, and in some families transposed. Moving between the two moves bytes and computes nothing.
"""

# k experts of a layer, D hidden_size, F moe_intermediate_size

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metier.models.moe import MoELayer


def matrix_shapes(layer: MoELayer) -> dict[str, tuple[int, ...]]:
    """Shape of each matrix and bias of one expert, by its name in a checkpoint, such as `gate_proj.weight`."""
    up = (layer.moe_intermediate_size, layer.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"gate_proj.weight": up} if layer.has_gate else {}
    shapes |= {"up_proj.weight": up, "down_proj.weight": (layer.hidden_size, layer.moe_intermediate_size)}
    if layer.has_bias:
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return shapes


def split_rows(layer: MoELayer, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of a layer's experts.

    Args:
        layer: of the base; only its layout is looked at.
        rows: by the base's parameter names, (k, …) in the base's layout.

    Returns:
        by the names of `matrix_shapes`, (k, out, in), biases (k, out); views of `rows`, so not contiguous.
    """
    matrices = {}
    for name, tensor in rows.items():
        projection, kind = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
        if kind == "weight" and layer.is_transposed:
            tensor = tensor.transpose(1, 2)
        if projection != "gate_up_proj":
            matrices[f"{projection}.{kind}"] = tensor
        elif layer.is_concatenated:
            matrices[f"gate_proj.{kind}"], matrices[f"up_proj.{kind}"] = tensor.chunk(2, dim=1)
        else:
            matrices[f"gate_proj.{kind}"], matrices[f"up_proj.{kind}"] = tensor[:, ::2], tensor[:, 1::2]
    return matrices


def stack_rows(layer: MoELayer, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_rows`: (k, out, in) matrices to contiguous rows by the base's parameter names."""
    rows = {}
    for name in layer.parameter_names():
        projection, kind = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
        if projection != "gate_up_proj":
            tensor = matrices[f"{projection}.{kind}"]
        else:
            gate, up = matrices[f"gate_proj.{kind}"], matrices[f"up_proj.{kind}"]
            tensor = torch.cat([gate, up], 1) if layer.is_concatenated else torch.stack([gate, up], 2).flatten(1, 2)
        if kind == "weight" and layer.is_transposed:
            tensor = tensor.transpose(1, 2)
        rows[name] = tensor.contiguous()
    return rows
