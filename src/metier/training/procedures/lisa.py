"""LISA: the embeddings and the output layer always, of the decoder layers a few, which are drawn anew now and then.

Paper: arXiv:2403.17919. What rests has no gradients, and no optimizer state either: AdamW begins anew where it comes
back, which the paper leaves open and which is what bounds the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metier.errors import ConfigError
from metier.models.layers import layer_stacks
from metier.training.bare_optimizer import bare_optimizer


class Lisa(TrainerCallback):
    """Draws the layers before the steps that are multiples of an interval; a resumed run draws what it drew before.

    Args:
        num_layers: that are trained at a time.
        interval: steps between two draws.
        seed: of the draws.
    """

    def __init__(self, *, num_layers: int, interval: int, seed: int) -> None:
        if num_layers < 1 or interval < 1:
            raise ConfigError(
                f"lisa_layers and lisa_interval must be at least 1, got {num_layers} and {interval}. Raise them."
            )
        self.num_layers, self.interval, self.seed = num_layers, interval, seed
        self._drawn = -1

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        draw = state.global_step // self.interval
        if draw == self._drawn:
            return
        self._drawn = draw
        layers = [layer for stack in layer_stacks(model) for layer in stack]
        for layer in layers:
            layer.requires_grad_(False)
        for index in self.chosen(draw, len(layers)):
            layers[index].requires_grad_(True)
        if optimizer is not None:
            _forget_resting(bare_optimizer(optimizer))

    def chosen(self, draw: int, num_layers: int) -> list[int]:
        """The layers of one draw."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        order = torch.randperm(num_layers, generator=generator)
        return sorted(order[: self.num_layers].tolist())


def _forget_resting(optimizer: Optimizer) -> None:
    """Gradients and state of what is not trained now."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                parameter.grad = None
                optimizer.state.pop(parameter, None)
