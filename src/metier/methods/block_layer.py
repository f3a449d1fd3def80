"""What tuner layers around whole blocks share: which adapters answer, what the block reads, what is added to it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from metier.errors import DeltaError

_INPUT_NAMES = ("hidden_states", "hidden", "x", "input")


class BlockLayer(nn.Module, BaseTunerLayer):
    """Stands in a model for a module, which it keeps as `base_layer`; abstract.

    Parameters of adapters lie in dictionaries by adapter, whose names are in `adapter_layer_names`; what they are is in
    `configs`.
    """

    other_param_names: tuple[str, ...] = ("configs",)

    cannot_merge: ClassVar[str]
    """Why, as a sentence for an error."""

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer, self.path = base_layer, path
        self.configs: dict[str, Any] = {}
        self.merged_adapters: list[str] = []

    @property
    def adapter_names(self) -> Collection[str]:
        """The adapters that stand here."""
        return self.configs.keys()

    def answering(self) -> list[str]:
        """The adapters that stand here and take part in a forward pass now."""
        active: list[str] = self.active_adapters  # type: ignore[assignment]
        return [] if self.disable_adapters else [name for name in active if name in self.configs]

    def set_gradients(self) -> None:
        """Let the parameters of the active adapters want gradients, and no others; after an adapter was added."""
        BaseTunerLayer.set_adapter(self, self.active_adapters)

    def base_device(self) -> torch.device:
        """Where the module's own parameters are, and an adapter's are made."""
        return next((p.device for p in self.base_layer.parameters()), torch.device("cpu"))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise DeltaError(f"{self.path}: {self.cannot_merge}")

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments; attention modules take them by keyword."""
    if args:
        first: Tensor = args[0]
        return first
    found: Tensor = next(kwargs[name] for name in _INPUT_NAMES if name in kwargs)
    return found


def block_output(out: Any) -> Tensor:
    """The hidden states among a block's outputs: all of it, or the first of a tuple."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def with_output(out: Any, hidden: Tensor) -> Any:
    """A block's outputs with other hidden states."""
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def computed(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A linear layer of an adapter on hidden states, in their dtype, whatever its parameters are kept in."""
    assert isinstance(layer, nn.Linear), f"{type(layer).__name__} is no linear layer"
    bias = None if layer.bias is None else layer.bias.to(hidden.dtype)
    return F.linear(hidden, layer.weight.to(hidden.dtype), bias)
