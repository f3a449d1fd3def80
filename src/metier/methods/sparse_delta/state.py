"""What PEFT saves and loads of a sparse delta: differences and, for each parameter, at which positions they are.

A parameter of which every entry is trained has no positions in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from metier.errors import ConfigError, CorruptDeltaError
from metier.methods.sparse_delta.entries import checked_positions
from metier.methods.sparse_delta.layer import INDICES, VALUES, SparseDeltaLayer

_PEFT_PREFIX = "base_model.model."


def with_indices(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the positions of each parameter's entries, in the integer they are kept in.

    Args:
        model: with the adapter on it.
        adapter_name: whose differences `state` holds.
        state: by the model's own names, such as `….q_proj.sparse_delta_values_weight.default`.
    """
    indices = {
        f"{path}.{INDICES}{name}.{adapter_name}": layer.indices_of(name)[adapter_name]
        for path, layer, name in _parameters(model, adapter_name)
        if adapter_name in layer.indices_of(name)
    }
    return {**state, **indices}


def load_indices(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the positions of a file into their layers, once all of the file was found to fit; values are PEFT's to load.

    Args:
        model: with the adapter on it.
        adapter_name: whose entries are to be replaced.
        state: differences by the model's own names, positions by their stored ones, without an adapter name.

    Raises:
        CorruptDeltaError: a tensor is missing, foreign or of another shape, or positions are not in the parameter or
            not in order; nothing was loaded.
    """
    left, found = dict(state), []
    for path, layer, name in _parameters(model, adapter_name):
        values, size = layer.values_of(name)[adapter_name], layer.size_of(name)
        indices = _taken(left, path, name)
        _check(f"{path}.{VALUES}{name}", left.get(f"{path}.{VALUES}{name}.{adapter_name}"), tuple(values.shape))
        if len(values) < size:
            _check(f"{path}.{INDICES}{name}", indices, tuple(values.shape))
            assert indices is not None, "just checked"
            found.append((layer, name, _checked(f"{path}.{INDICES}{name}", indices, size)))
        elif indices is not None:
            raise CorruptDeltaError(
                f"{path}.{INDICES}{name}: the delta holds positions where its configuration trains every entry; "
                "nothing was loaded.\nThe file belongs to another adapter_config.json."
            )
    foreign = sorted(name for name in left if f".{VALUES}" in name and not name.endswith(f".{adapter_name}"))
    foreign += sorted(name for name in left if f".{INDICES}" in name)
    if foreign:
        raise CorruptDeltaError(
            f"{foreign[0]}: the delta holds a tensor that no layer of its configuration has; nothing was loaded.\n"
            "The file belongs to another adapter_config.json."
        )
    for layer, name, indices in found:
        layer.take_entries(adapter_name, name, indices)
    for _, layer, _ in _parameters(model, adapter_name):
        layer.entries_are_known(adapter_name)
    return left


def _parameters(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SparseDeltaLayer, str]]:
    for path, module in model.named_modules():
        if isinstance(module, SparseDeltaLayer):
            for name in module.names:
                if adapter_name in module.values_of(name):
                    yield path, module, name


def _taken(state: dict[str, Tensor], path: str, name: str) -> Tensor | None:
    # where the tuner was put into the model itself, files still have PEFT's prefix
    for stored in (f"{path}.{INDICES}{name}", f"{_PEFT_PREFIX}{path}.{INDICES}{name}"):
        if stored in state:
            return state.pop(stored)
    return None


def _checked(name: str, indices: Tensor, size: int) -> Tensor:
    try:
        checked = checked_positions(name, indices, size)
    except ConfigError as error:
        raise CorruptDeltaError(f"{error}\nThe file is altered; nothing was loaded.") from error
    if not bool((checked == indices.cpu()).all()):
        raise CorruptDeltaError(f"{name}: positions are not in order, which values are given by; nothing was loaded.")
    return checked


def _check(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != expected:
        got = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise CorruptDeltaError(
            f"{name}: the delta holds {got}, expected shape {expected} by its configuration; nothing was loaded.\n"
            "The file is truncated or belongs to another adapter_config.json."
        )
