"""Decoder layers and the last norm with a ladder at them: the backbone runs without autograd, the side network with."""

# B rows, T tokens of a row, D hidden_size

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from metier.errors import UnsupportedModelError
from metier.methods.block_layer import BlockLayer
from metier.methods.ladder.climb import Ladder
from metier.methods.ladder.config import LadderConfig
from metier.methods.ladder.side import SideHead, SideRung

CANNOT_MERGE = (
    "a ladder is a network of its own beside the backbone, which no weights of the base could stand for, so it cannot "
    "be merged. Serve it beside its base."
)


class LadderPart(BlockLayer):
    """Stands in a model for one of a decoder's modules, which it keeps as `base_layer`; abstract."""

    cannot_merge = CANNOT_MERGE

    def __init__(self, base_layer: nn.Module, path: str, hidden_size: int, ladder: Ladder) -> None:
        super().__init__(base_layer, path)
        self.hidden_size, self.ladder = hidden_size, ladder

    def __getattr__(self, name: str) -> Any:
        """What a model asks of a layer without calling it (which kind of attention it has, say) the base answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @abstractmethod
    def _add(self, adapter_name: str, config: LadderConfig) -> None:
        """Make an adapter's part of the side network."""

    def update_layer(self, adapter_name: str, config: LadderConfig) -> None:
        """Add an adapter which changes nothing yet."""
        self._add(adapter_name, config)
        self.configs[adapter_name] = config
        device = self.base_device()
        for parts in (getattr(self, name) for name in self.adapter_layer_names):
            # made on the meta device where PEFT is about to load its values
            if adapter_name in parts and not any(p.is_meta for p in parts[adapter_name].parameters()):
                parts[adapter_name].to(device)
        self.set_gradients()

    def _check_hidden(self, hidden: Any) -> None:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else None
        if shape is None or len(shape) != 3 or shape[-1] != self.hidden_size:
            raise UnsupportedModelError(
                f"{self.path}: got a hidden state of {type(hidden).__name__} {shape or ''}, expected (rows, tokens, "
                f"{self.hidden_size}).\nA ladder stands beside decoders that hand one hidden state from layer to layer."
            )


class LadderLayer(LadderPart):
    """A decoder layer. It runs as in inference, whatever comes into it, and its output is the side network's input."""

    adapter_layer_names = ("ladder_rung",)

    def __init__(self, base_layer: nn.Module, path: str, hidden_size: int, ladder: Ladder, number: int) -> None:
        super().__init__(base_layer, path, hidden_size, ladder)
        self.number = number
        self.ladder_rung = nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer that it stands for; the output has no part in autograd while a ladder is active."""
        names = self.answering()
        if not names:
            return self.base_layer(*args, **kwargs)
        with torch.no_grad():
            out = self.base_layer(*args, **kwargs)
        before = args[0] if args else kwargs["hidden_states"]
        after = out[0] if isinstance(out, tuple) else out
        self._check_hidden(after)
        cache = kwargs.get("past_key_values")
        for name in names:
            if name in self.ladder_rung:
                rung = self.ladder_rung[name]
                assert isinstance(rung, SideRung), "made below"
                self.ladder.rung(name, self.path, rung, before.detach(), after, cache)
        return out

    def _add(self, adapter_name: str, config: LadderConfig) -> None:
        if config.has_rung(self.number, self.ladder.num_layers):
            is_first = not any(config.has_rung(n, self.ladder.num_layers) for n in range(self.number))
            self.ladder_rung[adapter_name] = SideRung(self.hidden_size, config, is_first=is_first)


class LadderTop(LadderPart):
    """The decoder's last norm; what goes into it is the backbone's last hidden state and, on top, the side network's.

    From here on, in the norm and the output layer, autograd works as ever.
    """

    adapter_layer_names = ("ladder_head",)

    def __init__(self, base_layer: nn.Module, path: str, hidden_size: int, ladder: Ladder) -> None:
        super().__init__(base_layer, path, hidden_size, ladder)
        self.ladder_head = nn.ModuleDict()

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        names, sides = self.answering(), self.ladder.end()
        if names:
            self._check_hidden(hidden_BTD)
            hidden_BTD = hidden_BTD.detach()
            for name in names:
                added_BTD = self.ladder_head[name](sides[name].to(hidden_BTD.device))
                hidden_BTD = hidden_BTD + added_BTD.to(hidden_BTD.dtype)
        return self.base_layer(hidden_BTD, *args, **kwargs)

    def _add(self, adapter_name: str, config: LadderConfig) -> None:
        self.ladder_head[adapter_name] = SideHead(self.hidden_size, config)
