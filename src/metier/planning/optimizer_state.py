"""What a trained parameter has beside it: its gradient, and what the optimizer keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metier.catalogue.tree import method_of


def state_bytes_of(
    parameter: Tensor, method: str, options: Mapping[str, Any], *, in_layer: bool, num_layers: int
) -> tuple[int, int]:
    """Bytes of a parameter's gradient, and of the optimizer's state.

    Args:
        parameter: that wants gradients.
        method: of the run.
        options: of the method, those that the run sets.
        in_layer: whether it is in a decoder layer.
        num_layers: decoder layers in all.
    """
    num_bytes = parameter.numel() * parameter.element_size()
    chosen = {**method_of(method).procedure_options, **options}
    match method_of(method).optimizer:
        case "mezo":
            return 0, 0
        case "lisa" if in_layer:
            share = min(1.0, chosen["lisa_layers"] / max(1, num_layers))
            return int(num_bytes * share), int(2 * num_bytes * share)
        case "galore" if in_layer and parameter.dim() == 2:
            # two moments in the subspace, and the projection into it, where the matrix is no larger than that too
            rank = min(chosen["rank"], *parameter.shape)
            numbers = rank * (2 * max(parameter.shape) + min(parameter.shape))
            return num_bytes, numbers * parameter.element_size()
    return num_bytes, 2 * num_bytes
