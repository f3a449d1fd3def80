"""What FSDP2 gathers at once: a model's parameters in the units that accelerate makes of them, in forward order.

A unit is a decoder layer, the embeddings, or the final norm with the output layer; what is left is one more. Every
parameter is parted along its first axis: each process has `ceil(d0 / W)` slices of it, padded where they do not come
out even. So a parameter with fewer slices than there are processes, such as the rows of three experts, is not parted
any further.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

from metier.methods.meft import MeftLayer

_LEAST_MASTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter, as it is parted."""

    num_slices: int
    """Of its first axis."""
    slice_numbers: int
    itemsize: int
    is_trained: bool
    is_replica: bool = False
    """Left whole in each process: a sparse adapter's router."""

    @property
    def num_numbers(self) -> int:
        return self.num_slices * self.slice_numbers

    def shard_numbers(self, world_size: int) -> int:
        """Of the process that has most, padding included."""
        if self.is_replica:
            return self.num_numbers
        return -(-self.num_slices // world_size) * self.slice_numbers


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are gathered together."""

    name: str
    parts: tuple[Part, ...]
    stays_gathered: bool
    """From its forward to its backward pass."""
    layer: int | None = None
    """Of the decoder, counted from 0."""
    num_gathers: int = 1
    """For one batch."""
    is_sent_as_kept: bool = False
    """An output layer whose weight TRL gathers itself, where it does not share a unit with the norm."""

    @property
    def sharded(self) -> Iterator[Part]:
        return (part for part in self.parts if not part.is_replica)

    @property
    def is_trained(self) -> bool:
        return any(part.is_trained for part in self.parts)

    def gathered_bytes(self, world_size: int, cast_to: int | None) -> int:
        """Of the whole unit, padding included.

        Args:
            world_size: processes.
            cast_to: bytes of a number as it is sent, where that is not as it is kept.
        """
        cast = None if self.is_sent_as_kept else cast_to
        return sum(world_size * p.shard_numbers(world_size) * (cast or p.itemsize) for p in self.sharded)

    def reduced_bytes(self, world_size: int, cast_to: int | None) -> int:
        """Of the gradients that are reduced and scattered, padding included."""
        trained = (part for part in self.sharded if part.is_trained)
        return sum(world_size * part.shard_numbers(world_size) * (cast_to or part.itemsize) for part in trained)

    def gradient_bytes(self, cast_to: int | None) -> int:
        """Of its gradients before they are parted."""
        return sum(p.num_numbers * (cast_to or p.itemsize) for p in self.sharded if p.is_trained)

    def shard_bytes(self, world_size: int, *, trained: bool) -> int:
        """Of weights, frozen or trained, that a process keeps."""
        return sum(p.shard_numbers(world_size) * p.itemsize for p in self.parts if p.is_trained is trained)


def units_of(model: nn.Module, *, bf16: bool, checkpointing: bool) -> tuple[Unit, ...]:
    """A run's model in the units that a sharded run makes of it.

    Args:
        model: wrapped by the method; on any device.
        bf16: mixed precision, with which accelerate keeps trained weights in float32 at least.
        checkpointing: of gradients, for which adapters have the first layer's input want one.
    """
    replicas = {id(parameter) for parameter in _replicas(model)}
    seen: set[int] = set()

    def unit(name: str, modules: Iterable[nn.Module | None], *, stays: bool = False, layer: int | None = None) -> Unit:
        parts = []
        for parameter in (p for module in modules if module is not None for p in module.parameters()):
            if id(parameter) not in seen and parameter.numel():
                seen.add(id(parameter))
                parts.append(_part(parameter, id(parameter) in replicas, bf16=bf16))
        return Unit(name, tuple(parts), stays, layer)

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    weights = [getattr(module, "weight", None) for module in (embeddings, head)]
    tied = weights[0] is not None and weights[0] is weights[1]
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    of_layers = [unit(f"layer {number}", [layer], layer=number) for number, layer in enumerate(layers)]
    first = [] if tied else [unit("embeddings", [embeddings])]
    norm = _final_norm(model)
    tail = unit("norm and output layer", [norm, embeddings, head] if tied else [norm, head], stays=True)
    if norm is None and not tied:
        tail = dataclasses.replace(tail, is_sent_as_kept=True)
    found = [*first, *of_layers, tail, unit("rest", [model], stays=True)]
    wants = checkpointing and isinstance(model, PeftModel)
    return tuple(_with_gathers((each for each in found if each.parts), inputs_want_gradients=wants))


def _with_gathers(units: Iterable[Unit], *, inputs_want_gradients: bool) -> Iterator[Unit]:
    """Units that are gathered again in the backward pass: those that it goes through, and the one before the last of
    them, for FSDP2 fetches one ahead, needed or not."""
    found, wants = list(units), inputs_want_gradients
    gone_through = []
    for each in found:
        wants |= each.is_trained
        gone_through.append(wants)
    for each, here, next_one in zip(found, gone_through, [*gone_through[1:], False], strict=True):
        is_again = not each.stays_gathered and (here or next_one)
        yield dataclasses.replace(each, num_gathers=2 if is_again else 1)


def _part(parameter: nn.Parameter, is_replica: bool, *, bf16: bool) -> Part:
    num_slices = parameter.shape[0] if parameter.dim() else 1
    itemsize = parameter.element_size()
    if bf16 and parameter.requires_grad:
        itemsize = max(itemsize, _LEAST_MASTER_BYTES)
    return Part(num_slices, math.prod(parameter.shape[1:]), itemsize, parameter.requires_grad, is_replica)


def _replicas(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, MeftLayer):
            yield from module.meft_router.parameters()
            yield from module.meft_gradients.parameters()


def _final_norm(model: nn.Module) -> nn.Module | None:
    """The last norm among the outermost children, as accelerate looks for it."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else model
    if not isinstance(inner, nn.Module):
        return None
    norms = [child for child in inner.children() if "Norm" in type(child).__name__]
    return norms[-1] if norms else None


def cast_bytes(*, bf16: bool, on_accelerator: bool) -> int | None:
    """Bytes of a number as it is sent: with mixed precision on an accelerator two, else as it is kept."""
    return torch.bfloat16.itemsize if bf16 and on_accelerator else None
