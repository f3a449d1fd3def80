"""Routes that are drawn, put in the place of a router's choice, which would need numbers."""

# T tokens, E experts, K top_k

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from metier.models.moe import MoELayer
from metier.planning.routes import Chances, drawn


def route(layers: Sequence[MoELayer], chances: Chances, seed: int) -> Callable[[], None]:
    """Give layers' experts routes of their own; returns what takes them away again."""
    hooks = [layer.entry.register_forward_pre_hook(_Routes(layer, chances, seed)) for layer in layers]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


class _Routes:
    """A hook before a layer's experts: which of them each token has, the same whenever the layer is called again."""

    def __init__(self, layer: MoELayer, chances: Chances, seed: int) -> None:
        self.layer, self.chances, self.seed = layer, chances, seed
        self._drawn: dict[int, Tensor] = {}

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        num_tokens = len(args[0])  # a prompt's virtual tokens have routes too
        if num_tokens not in self._drawn:
            with _disable_current_modes():
                self._drawn[num_tokens] = self._draw(num_tokens)
        return (args[0], self._drawn[num_tokens], *args[2:])

    def _draw(self, num_tokens: int) -> Tensor:
        """(T, K)"""
        layer = self.layer
        generator = torch.Generator().manual_seed(self.seed + layer.index)
        if layer.index in self.chances:
            return drawn(self.chances[layer.index], num_tokens, layer.top_k, generator)
        chances_TE = torch.ones(num_tokens, layer.num_experts)
        return torch.multinomial(chances_TE, layer.top_k, generator=generator)
