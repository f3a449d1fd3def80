"""Where the layers of a step begin and end, both ways, and which of them stand for others."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from metier.errors import UnsupportedModelError
from metier.methods.ladder import LadderLayer
from metier.models.layers import layer_stacks
from metier.planning.segments import Segment
from metier.planning.trace import Operations, Tracer


class Marks:
    """Cuts what a tracer sees into segments."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.segments = tracer, list[Segment]()
        self._now: tuple[str, int | None] = ("forward", None)
        self._start()

    def _start(self) -> None:
        memory = self.tracer.memory
        memory.peak = self._live = memory.live
        self._small, self._large = memory.live_small, memory.made_large
        self.tracer.operations = Operations()

    def come_to(self, phase: str, layer: int | None) -> None:
        """What comes now is another part."""
        memory = self.tracer.memory
        self.segments.append(
            Segment(
                phase=self._now[0],
                layer=self._now[1],
                kept_bytes=memory.live - self._live,
                peak_bytes=memory.peak - self._live,
                fresh_bytes=memory.made_large - self._large + max(0, memory.live_small - self._small),
                operations=self.tracer.operations,
            )
        )
        self._now = (phase, layer)
        self._start()


class _InPlace(nn.Module):
    """Stands where a layer stood: calls it and says when it begins and ends, both ways; without marks skips it."""

    def __init__(self, layer: nn.Module, number: int, marks: Marks | None) -> None:
        super().__init__()
        self.layer, self.number, self._marks = layer, number, marks

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        marks, number = self._marks, self.number
        hidden = args[0] if args else kwargs["hidden_states"]
        if marks is None:
            return hidden
        if number == 0 and hidden.requires_grad:
            hidden.register_hook(lambda _: marks.come_to("backward", None))
        marks.come_to("forward", number)
        known = self._side_states()
        out = self.layer(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        for state in (hidden, *(side for side in self._side_states() if all(side is not one for one in known))):
            if state.requires_grad:
                state.register_hook(lambda _: marks.come_to("backward", number))
        marks.come_to("forward", None)
        return out

    def _side_states(self) -> list[Tensor]:
        """Of a ladder, by which the backward pass comes where it does not come by the layers."""
        return list(self.layer.ladder.sides.values()) if isinstance(self.layer, LadderLayer) else []


def cut_to_some_of_a_kind(model: nn.Module, marks: Marks) -> list[int]:
    """Leave two layers of each kind, and the last one; returns which of them stands for each layer.

    The first of a kind frees what it shared with those after it, and what comes after the last one is different, so
    those stand for themselves alone.
    """
    layers = only_stack(model)
    kinds = list(_kinds(model, layers))
    last = len(kinds) - 1
    firsts = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    alone = {*firsts.values(), last}
    others = {kind: number for number, kind in enumerate(kinds) if number not in alone}
    order = [number if number in alone else others[kind] for number, kind in enumerate(kinds)]
    for number, layer in enumerate(layers):
        layers[number] = _InPlace(layer, number, marks if number in order else None)
    return order


def only_stack(model: nn.Module) -> nn.ModuleList:
    found = layer_stacks(model)
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: has {len(found)} stacks of layers, expected one; its step cannot be traced."
        )
    return found[0]


def _kinds(model: nn.Module, layers: nn.ModuleList) -> Iterator[Hashable]:
    """What a layer's part in a step depends on."""
    first = id(next(layers.parameters()))
    is_trained_before = False
    for parameter in model.parameters():
        if id(parameter) == first:
            break
        is_trained_before |= parameter.requires_grad
    for layer in layers:
        named = tuple(
            (name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        )
        kind = getattr(layer, "attention_type", getattr(layer, "layer_type", None))
        windows = tuple(getattr(module, "sliding_window", None) for module in layer.modules())
        yield type(layer), named, kind, windows, is_trained_before
        is_trained_before |= any(parameter.requires_grad for parameter in layer.parameters())
