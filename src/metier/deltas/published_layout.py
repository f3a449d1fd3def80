"""Under which names a family publishes single experts, found by asking transformers' own conversion.

transformers stacks single experts when it loads a checkpoint and takes them apart when it saves one. Nothing here knows
a family's names: what goes through that conversion arrives under them.
"""

# E experts, U output rows of a stacked weight

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from metier.models.moe import MoELayer


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedMatrix:
    """One expert's matrix as a tensor of its own in the checkpoint, such as `….experts.7.gate_proj.weight`."""

    name: str
    expert: int
    rows: slice
    """Its output rows among those of the stacked weight, in which gate and up are one."""


def published_matrices(model: PreTrainedModel, layer: MoELayer, weight: str) -> list[PublishedMatrix] | None:
    """The matrices that one stacked weight is published as, or None where the family publishes it stacked.

    Each output row is numbered, on one input column, and sent through the conversion; the numbers that arrive under a
    name say whose rows it holds.

    Args:
        model: with or without its weights.
        layer: of it.
        weight: `gate_up_proj`, `up_proj` or `down_proj`.
    """
    shape = getattr(layer.experts, weight).shape
    num_rows = shape[2] if layer.is_transposed else shape[1]
    numbers_EU = torch.arange(layer.num_experts * num_rows).view(layer.num_experts, num_rows)
    numbered = numbers_EU.unsqueeze(1 if layer.is_transposed else 2)
    found = revert_weight_conversion(model, {f"{layer.path}.{weight}": numbered})
    matrices = [_matrix(name, numbers, num_rows) for name, numbers in found.items()]
    whole = [matrix for matrix in matrices if matrix is not None]
    return whole if len(whole) == len(matrices) else None


def _matrix(name: str, numbers: Tensor, num_rows: int) -> PublishedMatrix | None:
    if numbers.dim() != 2 or numbers.shape[1] != 1:
        return None
    row_numbers = numbers.flatten()
    first, count = int(row_numbers[0]), len(row_numbers)
    expert, start = divmod(first, num_rows)
    step = int(row_numbers[1]) - first if count > 1 else 1
    rows = slice(start, start + (count - 1) * step + 1, step)
    is_run = torch.equal(row_numbers, first + step * torch.arange(count))
    return PublishedMatrix(name=name, expert=expert, rows=rows) if is_run and rows.stop <= num_rows else None
