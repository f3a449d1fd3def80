"""Chosen entries as they are stored: checked against the base, and how many there are without data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metier.errors import ConfigError
from metier.methods.sparse_delta.candidates import candidates, chosen_layers, new_biases
from metier.methods.sparse_delta.config import WHOLE, SparseDeltaConfig
from metier.methods.sparse_delta.masks.heads import counts_of_heads, entries_of_heads
from metier.methods.sparse_delta.masks.shares import index_dtype, shares
from metier.models.attention_heads import attention_heads
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
    if config.mask == "head":
        chosen = config.heads or _some_heads(model, config)
        return counts_of_heads(attention_heads(model), chosen, _shapes(model, config))
    found = {parameter.path: parameter.parameter.numel() for parameter in candidates(model, config)}
    total = sum(found.values())
    count = config.budget(total)
    if count > total:
        raise ConfigError(f"num_entries={count} is more than the {total} entries of the target parameters.")
    return shares(found, count)


def whole_entries(model: nn.Module, config: SparseDeltaConfig) -> dict[str, Tensor]:
    """The entries of the masks that take whole parts: all of each parameter, or those of named heads."""
    if config.mask == "head":
        return entries_of_heads(attention_heads(model), config.heads or {}, _shapes(model, config))
    return {path: torch.arange(size, dtype=index_dtype(size)) for path, size in whole_sizes(model, config).items()}


def _shapes(model: nn.Module, config: SparseDeltaConfig) -> dict[str, tuple[int, ...]]:
    return {parameter.path: tuple(parameter.parameter.shape) for parameter in candidates(model, config)}


def _some_heads(model: nn.Module, config: SparseDeltaConfig) -> dict[int, list[int]]:
    """As many as the budget has entries for, evenly over the layers: which ones are best only data can say."""
    heads, shapes = attention_heads(model), _shapes(model, config)
    pairs = [(found.layer, number) for found in heads for number in range(found.num_heads)]
    of_all = sum(counts_of_heads(heads, {found.layer: range(found.num_heads) for found in heads}, shapes).values())
    budget = config.budget(sum(map(math.prod, shapes.values())))
    count = min(len(pairs), max(1, budget * len(pairs) // max(1, of_all)))
    chosen: dict[int, list[int]] = {}
    for layer, number in (pairs[place * len(pairs) // count] for place in range(count)):
        chosen.setdefault(layer, []).append(number)
    return chosen


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
