"""What PEFT saves and loads of an adapter on experts: its rows and, for each layer, which experts the rows are.

PEFT reads a folder's `adapter_config.json` only for an adapter name that the model does not have yet. Loaded over one
that it has (as transformers' Trainer does when it resumes), rows of other experts with the same shapes would be taken
as they come. So the rows say themselves which experts they are, and nothing is loaded before that is compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metier.errors import CorruptDeltaError
from metier.methods.expert_layer import ExpertTunerLayer

_PEFT_PREFIX = "base_model.model."
_FSDP_PART = "_fsdp_wrapped_module."


def with_expert_ids(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, and for each layer whose rows are in it the ids of their experts, int64 `(k,)`.

    They are no part of `model.state_dict()`, of which accelerate shards every entry under FSDP2 as a parameter.

    Args:
        model: with the adapter on it.
        adapter_name: whose rows `state` holds.
        state: rows by the model's own names, such as `….experts.esft_down_proj.default`.
    """
    ids = {
        f"{path}.{layer.ids_name}.{adapter_name}": getattr(layer, layer.ids_name)[adapter_name]
        for path, layer in _layers(model)
        if f"{path}.{layer.adapter_layer_names[0]}.{adapter_name}" in state
    }
    return {**state, **ids}


def checked_state(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows that may be loaded: `state` without the expert ids, once they were found to be the adapter's.

    PEFT loads with `strict=False` and warns; a delta with a tensor too few would quietly serve base experts.

    Args:
        model: with the adapter on it, whose rows are to be replaced.
        adapter_name: of that adapter.
        state: rows by the model's own names, and expert ids by their stored ones, which have no adapter name.

    Raises:
        CorruptDeltaError: a tensor is missing, foreign or of another shape, or the rows are those of other experts.
    """
    layers = {path: layer for path, layer in _layers(model) if layer.expert_ids(adapter_name)}
    named = {_with_adapter(name, layers, adapter_name): tensor for name, tensor in state.items()}
    _check_shapes(layers, adapter_name, named)
    for path, layer in layers.items():
        _check_ids(layer, adapter_name, named.pop(f"{path}.{layer.ids_name}.{adapter_name}"))
    return named


def _layers(model: nn.Module) -> Iterator[tuple[str, ExpertTunerLayer]]:
    """The model's tuner layers by their path as `state_dict` gives it."""
    for path, module in model.named_modules():
        if isinstance(module, ExpertTunerLayer):
            yield path.replace(_FSDP_PART, ""), module


def _with_adapter(name: str, layers: dict[str, ExpertTunerLayer], adapter_name: str) -> str:
    path, _, last = name.rpartition(".")
    if last not in {layer.ids_name for layer in layers.values()}:
        return name  # PEFT's own remapping did it
    # where the tuner was put into the model itself, files still have PEFT's prefix
    own = path if path in layers else path.removeprefix(_PEFT_PREFIX)
    return f"{own}.{last}.{adapter_name}" if own in layers else name


def _check_shapes(layers: dict[str, ExpertTunerLayer], adapter_name: str, named: dict[str, Tensor]) -> None:
    wanted = {
        f"{path}.{name}.{adapter_name}": tuple(getattr(layer, name)[adapter_name].shape)
        for path, layer in layers.items()
        for name in (*layer.adapter_layer_names, layer.ids_name)
    }
    for name in sorted(wanted.keys() | named.keys()):
        got = tuple(named[name].shape) if name in named else None
        if got != wanted.get(name):
            raise CorruptDeltaError(
                f"{name}: the delta holds {'no such tensor' if got is None else f'shape {got}'}, expected "
                f"{'no such tensor' if name not in wanted else f'shape {wanted[name]}'} by its configuration.\n"
                "The file is truncated or belongs to another adapter_config.json; nothing was loaded."
            )


def _check_ids(layer: ExpertTunerLayer, adapter_name: str, stored: Tensor) -> None:
    expected = layer.expert_ids(adapter_name)
    if stored.dtype != torch.int64 or stored.tolist() != expected:
        kind = "" if stored.dtype == torch.int64 else f" as {stored.dtype}"
        raise CorruptDeltaError(
            f"layers.{layer.layer_index}: the delta holds rows of experts {stored.tolist()}{kind}, expected "
            f"{expected}, which adapter '{adapter_name}' of this model replaces; nothing was loaded.\n"
            f"PEFT does not read the configuration of what it loads over an adapter: load it under a new name, or "
            f"delete '{adapter_name}' first. If it was loaded as a new adapter, its adapter_config.json is another's."
        )
