"""Does a delta fit a base that is loaded: fingerprint, experts, shapes; and do its rows differ from the base's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from metier.deltas.adapter_config import AdapterConfig
from metier.deltas.changes import changed_parameters, merged_rows
from metier.deltas.format import NAME_PREFIX, rows_name
from metier.deltas.low_rank import stack_shapes
from metier.deltas.read import Delta
from metier.errors import BaseMismatchError, CorruptDeltaError, SelectionError
from metier.models.fingerprint import fingerprint
from metier.models.moe import MoELayer, moe_layers
from metier.models.unwrap import base_module


class Configured(Protocol):
    """A delta in a folder, compressed or not."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> AdapterConfig: ...


def check_fingerprint(delta: Configured, model: nn.Module, base_name: str) -> None:
    """Raise a BaseMismatchError if `delta` was trained on another base, or does not say on which."""
    compare_fingerprint(delta, fingerprint(model), base_name)


def compare_fingerprint(delta: Configured, got: str, base_name: str) -> None:
    """As `check_fingerprint`, where the base's fingerprint is known already."""
    expected = delta.config.base_fingerprint
    if expected is None:
        raise BaseMismatchError(
            f"{delta.folder}: the delta carries no base_fingerprint, expected {got[:12]}… for base {base_name!r}.\n"
            "It was never on a model. Load it with `peft.PeftModel.from_pretrained`, and save it again."
        )
    if expected != got:
        raise BaseMismatchError(
            f"{delta.folder}: the delta was trained on {delta.config.base_name!r} with fingerprint {expected[:12]}…, "
            f"but base {base_name!r} has {got[:12]}….\nLoad the base that it was trained on, or train it again."
        )


def check_experts(delta: Configured, model: nn.Module, base_name: str) -> None:
    """Raise a SelectionError if a selected layer or expert is none of the base's."""
    compare_experts(delta, moe_layers(model), base_name)


def compare_experts(delta: Configured, base_layers: Sequence[MoELayer], base_name: str) -> None:
    """As `check_experts`, where the base's layers are known already."""
    layers = {layer.index: layer for layer in base_layers}
    for index, ids in delta.config.experts.items():
        if index not in layers:
            raise SelectionError(
                f"{delta.folder}: layers.{index}: base {base_name!r} has no MoE layer there; its MoE layers are "
                f"{sorted(layers)}.\nLoad the base that the delta was trained on."
            )
        beyond = [expert for expert in ids if expert >= layers[index].num_experts]
        if beyond:
            raise SelectionError(
                f"{delta.folder}: layers.{index}: the delta replaces expert {beyond[0]}, but base {base_name!r} has "
                f"num_experts={layers[index].num_experts}.\nLoad the base that the delta was trained on."
            )


def check_tensors(delta: Delta, model: nn.Module) -> None:
    """Raise a CorruptDeltaError unless the delta holds, for each selected expert, the rows of each stacked parameter
    of the base, and nothing else."""
    compare_tensors(delta, moe_layers(model), _whole_shapes(delta, model))


def compare_tensors(
    delta: Delta, base_layers: Sequence[MoELayer], whole_shapes: dict[str, tuple[int, ...]] | None = None
) -> None:
    """As `check_tensors`, where the base's layers are known already.

    Args:
        delta: of the base, as `compare_experts` has it.
        base_layers: all of the base's; of their parameters only shapes are looked at.
        whole_shapes: by stored name, what the parameters of modules that are replaced whole have to be.
    """
    expected = dict(whole_shapes or {})
    for layer in base_layers:
        if layer.index in delta.config.experts:
            shapes = _shapes(delta.config, layer).items()
            expected |= {rows_name(layer.path, name, delta.config.method): shape for name, shape in shapes}
    for name in sorted(expected.keys() | delta.tensors.keys()):
        got = delta.tensors[name].shape if name in delta.tensors else None
        if got != expected.get(name):
            raise CorruptDeltaError(
                f"{delta.folder}: {name}: got {_shape(got)}, expected {_shape(expected.get(name))} by the base's "
                "experts.\nThe delta belongs to another base, or was altered."
            )


def _whole_shapes(delta: Delta, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """By stored name: what the parameters of modules that are replaced whole have to be."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in delta.config.whole_modules:
        module = base_module(model, path)
        if module is None:
            raise CorruptDeltaError(
                f"{delta.folder}: the delta replaces module {path}, which the base does not have.\n"
                "The delta belongs to another base, or was altered."
            )
        shapes |= {f"{NAME_PREFIX}{path}.{name}": tuple(p.shape) for name, p in module.named_parameters()}
    return shapes


def _shapes(config: AdapterConfig, layer: MoELayer) -> dict[str, tuple[int, ...]]:
    """What a delta's tensors in a layer have to be, by their name without the prefix."""
    ids = config.experts[layer.index]
    if config.low_rank is None:
        return {name: (len(ids), *getattr(layer.experts, name).shape[1:]) for name in layer.parameter_names()}
    rank, inner = max(config.low_rank.rank(layer.index, expert) for expert in ids), layer.moe_intermediate_size
    return stack_shapes(len(ids), rank, layer.hidden_size, inner * (2 if layer.has_gate else 1), inner)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"shape {list(shape)}"


def rows_not_finite(delta: Delta) -> list[str]:
    """Stored tensors that hold a value which is not a number or infinite, as `layers.7.down_proj`."""
    return [
        f"layers.{layer}.{name}"
        for layer, tensors in delta.load_rows().items()
        for name, rows in tensors.items()
        if not torch.isfinite(rows).all()
    ] + [
        f"{path}.{name}"
        for path, values in delta.load_whole().items()
        for name, value in values.items()
        if not torch.isfinite(value).all()
    ]


def rows_not_moved(delta: Delta, model: nn.Module) -> Iterator[str]:
    """Selected rows that are the base's to the bit in the base's dtype, as `layers.7 expert 26 down_proj`.

    Rows that a LoRA leaves as they are count too: its change is then 0, or too small for the base's dtype.
    """
    rows = delta.load_rows()
    for layer in moe_layers(model):
        ids = delta.config.experts.get(layer.index, ())
        for name in changed_parameters(delta, layer) if ids else ():
            base = getattr(layer.experts, name).detach()[list(ids)]
            moved = (merged_rows(delta, rows, layer, name) != base).flatten(1).any(1).tolist()
            for expert, has_moved in zip(ids, moved, strict=True):
                if not has_moved:
                    yield f"layers.{layer.index} expert {expert} {name}"
    for path, values in delta.load_whole().items():
        module = base_module(model, path)
        assert module is not None, "check_tensors found every module"
        for name, parameter in module.named_parameters():
            if torch.equal(values[name].to(parameter), parameter):
                yield f"{path}.{name}"
