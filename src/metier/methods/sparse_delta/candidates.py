"""Which of a base's parameters a configuration may choose entries of."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from metier.errors import ConfigError, UnsupportedModelError
from metier.methods.sparse_delta.config import SparseDeltaConfig
from metier.models.base_parameters import KINDS, BaseParameter, base_parameters, linear_modules
from metier.models.moe import is_dense
from metier.models.unwrap import bare_model

DEFAULT_KINDS = ("linear", "experts")


def candidates(model: nn.Module, config: SparseDeltaConfig) -> list[BaseParameter]:
    """The parameters that entries are chosen of, in the model's order; for masks of whole parameters, those.

    Raises:
        ConfigError: a name that matches nothing, or a parameter that cannot be trained in place.
        UnsupportedModelError: the model has no such parameters, or MoE layers that metier does not know.
    """
    found = _of_mask(_targeted(base_parameters(model), config), config)
    if not found and not (config.mask == "bias" and new_biases(model, config)):
        wanted = {"bias": "biases", "norm": "norms"}.get(config.mask, "parameters of the kinds that are wanted")
        raise UnsupportedModelError(
            f"{type(bare_model(model)).__name__}: among its target parameters are no {wanted}.\n"
            "Name others by target_kinds or target_modules, or choose another mask."
        )
    if config.target_modules is None:
        is_dense(model)  # refuses experts that the list of kinds would pass over
    for parameter in found:
        if not parameter.parameter.is_floating_point():
            raise ConfigError(
                f"{parameter.path}: a parameter of {parameter.parameter.dtype}, expected floating-point numbers: "
                "quantised weights have no entries that could be trained in place.\nLoad the base without quantisation."
            )
    return found


def new_biases(model: nn.Module, config: SparseDeltaConfig) -> dict[str, int]:
    """Paths and sizes of the biases that mask `bias` adds to linear layers without one."""
    if config.mask != "bias" or config.new_biases == "never":
        return {}
    linear = {path: module for path, module in linear_modules(model).items() if _is_named(f"{path}.bias", config)}
    has_some = any(getattr(module, "bias", None) is not None for module in linear.values())
    if config.new_biases == "auto" and has_some:
        return {}
    return {
        f"{path}.bias": int(module.out_features)  # type: ignore[arg-type]
        for path, module in linear.items()
        if getattr(module, "bias", None) is None
    }


def chosen_layers(model: nn.Module, config: SparseDeltaConfig) -> list[int]:
    """The decoder layers of mask `layer`.

    Raises:
        ConfigError: a layer that the model does not have, or more than it has.
    """
    there = sorted({found.layer for found in base_parameters(model) if found.layer is not None})
    if config.last_layers is not None:
        if config.last_layers > len(there):
            raise ConfigError(f"last_layers={config.last_layers} is more than the {len(there)} layers of the model.")
        return there[-config.last_layers :]
    layers = config.layers or []
    if stray := [layer for layer in layers if layer not in there]:
        raise ConfigError(f"layers names layer {stray[0]}, but the model has layers {there[0]} to {there[-1]}.")
    return layers


def _targeted(parameters: Sequence[BaseParameter], config: SparseDeltaConfig) -> list[BaseParameter]:
    if config.target_modules is None:
        kinds = config.target_kinds or (KINDS if config.mask in ("bias", "norm", "layer") else DEFAULT_KINDS)
        return [found for found in parameters if found.kind in kinds]
    if not isinstance(config.target_modules, str):
        paths = [path for found in parameters for path in (found.path, *found.also_at)]
        for name in config.target_modules:
            if not any(_ends_with(path, name) for path in paths) and not _names_new_bias(name, config):
                raise ConfigError(
                    f"target_modules names {name!r}, which no parameter of the model and no module with parameters "
                    f"ends with.\nIts parameters are called like {', '.join(paths[:3])}."
                )
    named = [found for found in parameters if any(_is_named(path, config) for path in (found.path, *found.also_at))]
    if not named and isinstance(config.target_modules, str):
        raise ConfigError(f"target_modules: no module's path matches the regular expression {config.target_modules!r}.")
    return named


def _of_mask(parameters: Sequence[BaseParameter], config: SparseDeltaConfig) -> list[BaseParameter]:
    if config.mask in ("bias", "norm"):
        return [found for found in parameters if found.kind == config.mask]
    return list(parameters)


def _is_named(path: str, config: SparseDeltaConfig) -> bool:
    if config.target_modules is None:
        return True
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, path.rpartition(".")[0]) is not None
    return any(_ends_with(path, name) for name in config.target_modules)


def _ends_with(path: str, name: str) -> bool:
    """Whether `name` is the end of a parameter's path, or of its module's."""
    return any(f".{whole}".endswith(f".{name}") for whole in (path, path.rpartition(".")[0]))


def _names_new_bias(name: str, config: SparseDeltaConfig) -> bool:
    return config.mask == "bias" and name.endswith("bias")
