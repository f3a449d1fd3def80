"""One linear layer with the LoRAs of many deltas: the base's product once, and each delta's thin ones on its tokens."""

# T tokens, I inputs, O outputs, R rank

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metier.serving.step import current_step


@dataclass(frozen=True, slots=True)
class LinearLora:
    """What a LoRA adds to a weight: `scale * B A`; the scale is in B already."""

    a_RI: Tensor
    b_OR: Tensor

    @property
    def num_bytes(self) -> int:
        return self.a_RI.nbytes + self.b_OR.nbytes


class ServedLinear(nn.Module):
    """Stands in a model for a linear module, which it keeps as `base_layer`.

    `loras` has a delta's matrices under its number; it is written before the number is given to a request.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.loras: dict[int, LinearLora] = {}

    @property
    def weight(self) -> Tensor:
        """The base's, at whose dtype some models look before they call a layer."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, inputs: Tensor) -> Tensor:
        """(…, I) → (…, O): rows of all tokens, of those kept for the output layer, or several of each token."""
        out: Tensor = self.base_layer(inputs)
        step = current_step()
        if step is None or not any(number in self.loras for number in step.numbers):
            return out
        inputs_TI, out_TO = inputs.flatten(0, -2), out.flatten(0, -2)
        for number, first, end in step.runs_of(len(inputs_TI)):
            lora = self.loras.get(number)
            if lora is not None:
                out_TO[first:end] += (inputs_TI[first:end].to(lora.a_RI.dtype) @ lora.a_RI.t()) @ lora.b_OR.t()
        return out_TO.view(out.shape)
