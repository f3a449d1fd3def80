"""Chosen entries as they are stored: checked against the base, and how many there are without data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metier.errors import ConfigError
from metier.methods.sparse_delta.candidates import candidates, chosen_layers, new_biases
from metier.methods.sparse_delta.config import WHOLE, SparseDeltaConfig
from metier.methods.sparse_delta.masks.shares import index_dtype, shares
from metier.models.base_parameters import base_modules, base_parameters


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Entries of every parameter that can be trained: those of the base, and biases that a linear layer could have."""
    sizes = {
        f"{path}.bias": module.out_features
        for path, module in base_modules(model)
        if isinstance(module, nn.Linear) and module._parameters.get("bias") is None
    }
    return sizes | {found.path: found.parameter.numel() for found in base_parameters(model)}


def planned_counts(model: nn.Module, config: SparseDeltaConfig) -> dict[str, int]:
    """How many entries each parameter would get where nothing says which: by size, of whole parts all of them.

    With data a global mask spreads the same number of entries unevenly, which costs the same memory but for padding.
    """
    if config.mask in WHOLE:
        return whole_sizes(model, config)
    if config.heads is not None:
        return {path: len(indices) for path, indices in whole_entries(model, config).items()}
    found = {parameter.path: parameter.parameter.numel() for parameter in candidates(model, config)}
    total = sum(found.values())
    count = config.budget(total)
    if count > total:
        raise ConfigError(f"num_entries={count} is more than the {total} entries of the target parameters.")
    return shares(found, count)


def whole_entries(model: nn.Module, config: SparseDeltaConfig) -> dict[str, Tensor]:
    """The entries of the masks that take whole parts: all of each parameter, or those of named heads."""
    if config.mask == "head":
        found = candidates(model, config)
        from metier.methods.sparse_delta.masks.heads import entries_of_heads
        from metier.models.attention_heads import attention_heads

        shapes = {parameter.path: tuple(parameter.parameter.shape) for parameter in found}
        return entries_of_heads(attention_heads(model), config.heads or {}, shapes)
    return {path: torch.arange(size, dtype=index_dtype(size)) for path, size in whole_sizes(model, config).items()}


def whole_sizes(model: nn.Module, config: SparseDeltaConfig) -> dict[str, int]:
    """The parameters that a mask takes whole, and how many entries each has."""
    found = candidates(model, config)
    if config.mask == "layer":
        layers = chosen_layers(model, config)
        found = [parameter for parameter in found if parameter.layer in layers]
    return {parameter.path: parameter.parameter.numel() for parameter in found} | new_biases(model, config)


def checked_entries(entries: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Entries as an adapter stores them: flat positions in the smaller integer, sorted.

    Raises:
        ConfigError: a parameter that the base does not have, positions outside of it or twice, or none at all.
    """
    checked = {}
    for path, positions in entries.items():
        if path not in sizes:
            raise ConfigError(f"entries names {path!r}, which is no parameter of the base.")
        checked[path] = checked_positions(path, torch.as_tensor(positions), sizes[path])
    return checked


def checked_positions(path: str, positions: Tensor, size: int) -> Tensor:
    """One parameter's flat positions, sorted.

    Raises:
        ConfigError: they are no whole numbers, outside the parameter, twice, or none.
    """
    flat = positions.detach().reshape(-1).cpu()
    if not len(flat) or flat.is_floating_point() or flat.dtype == torch.bool:
        raise ConfigError(f"{path}: entries must be whole numbers and at least one, got {len(flat)} of {flat.dtype}.")
    ordered = flat if bool((flat[1:] > flat[:-1]).all()) else flat.sort().values
    if int(ordered[0]) < 0 or int(ordered[-1]) >= size:
        raise ConfigError(f"{path}: entries from {int(ordered[0])} to {int(ordered[-1])}, expected 0 to {size - 1}.")
    if not bool((ordered[1:] > ordered[:-1]).all()):
        raise ConfigError(f"{path}: entries name a position twice; expected each once.")
    return ordered.to(index_dtype(size))
