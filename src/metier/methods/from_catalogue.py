"""Put a method of the catalogue on a model: its configuration from a run's keys, and PEFT's own functions."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier.catalogue.method import DENSE, MOE, Method
from metier.catalogue.options import config_class
from metier.catalogue.tree import method_of
from metier.config import LORA_KEYS, RunConfig
from metier.errors import ConfigError, MetierError, UnsupportedModelError
from metier.memory.frozen_weight import FrozenWeight
from metier.methods.coverage import check_coverage
from metier.methods.single_task import with_one_task
from metier.methods.sparse_delta import SparseDeltaConfig, prepare
from metier.methods.sparse_delta.masks.gradients import Batch
from metier.models.encoder_decoder import is_encoder_decoder
from metier.models.layers import index_of_owner
from metier.models.load import first_line
from metier.models.moe import is_dense
from metier.models.parts import modules_of, part_paths

_OF_A_RUN = (*LORA_KEYS, "seed")
"""Options that are keys of a run themselves."""


class NeedsWeightsError(UnsupportedModelError):
    """A method cannot be put on a model without weights, which is what a plan has."""


def put_on(
    model: PreTrainedModel, config: RunConfig, batches: Iterable[Batch] = (), checkpoint: Path | None = None
) -> peft.PeftModel:
    """The model with the run's method on it, checked to cover what it was to cover.

    Args:
        model: the base.
        config: the run.
        batches: of its data, for methods that look at them to choose what they train.
        checkpoint: from which the run is going on. A sparse delta chooses nothing anew then: it has as many entries
            as that one, whose file says which.

    Raises:
        UnsupportedModelError: the method does not fit this kind of model.
        NeedsWeightsError: the model has no weights, and PEFT asks for some.
        ConfigError: options that PEFT refuses, or an adapter that attaches to nothing, or not to all that was meant.
    """
    method = method_of(config.method)
    check_fits(method, model)
    made = adapter_config(model, config)
    parts = target_parts(method, config, model)
    has_weights = not any(parameter.is_meta for parameter in model.parameters())
    if isinstance(made, SparseDeltaConfig) and has_weights and made.entries is None:
        if checkpoint is not None:
            made.num_entries_by_parameter = SparseDeltaConfig.from_pretrained(checkpoint).num_entries_by_parameter
        elif made.needs_data:
            prepare(model, made, batches)
    try:
        wrapped = peft.get_peft_model(model, made)
    except MetierError:
        raise
    except ImportError as error:
        raise _missing(method, error) from error
    except Exception as error:  # thirty methods of PEFT refuse in as many ways
        if not has_weights:
            raise NeedsWeightsError(
                f"{method.name}: PEFT begins it from the model's weights, so that it cannot be planned without them "
                f"({first_line(error)})."
            ) from error
        raise ConfigError(
            f"{method.name}: PEFT cannot put it on {type(model).__name__}: {first_line(error)}"
        ) from error
    # a sparse delta takes the best entries of all parts, which may be none of one of them
    wanted = () if isinstance(made, SparseDeltaConfig) or _names_modules(config) else parts
    check_coverage(wrapped, wanted, names_modules="target_modules" in config.method_options, method=method.name)
    refuse_stored_stacks(method, wrapped, is_stored=lambda weight: isinstance(weight, FrozenWeight))
    if method.optimizer == "lora_fa":
        for name, parameter in wrapped.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return with_one_task(wrapped)


def refuse_stored_stacks(method: Method, wrapped: nn.Module, *, is_stored: Callable[[Tensor], bool]) -> None:
    """Raise a ConfigError where PEFT's LoRA is on stacked experts that lie in a store."""
    for path, module in wrapped.named_modules():
        if isinstance(module, ParamWrapper) and is_stored(module.get_param()):
            raise ConfigError(
                f"{method.name}: {path}.{module.parameter_name} lies in a store (base_store, base_format), and PEFT's "
                "LoRA on stacked experts makes the changed weights of all of them at each step.\nUse method: "
                "expert_lora, which reads the experts one by one, go on other parts (targets: attention), or leave "
                "the store out."
            )


def check_fits(method: Method, model: PreTrainedModel) -> None:
    """Raise an UnsupportedModelError where a method is not for this kind of model."""
    kind = DENSE if is_dense(model) else MOE
    if kind not in method.fits:
        raise UnsupportedModelError(
            f"{method.name}: {type(model).__name__} is a {'dense' if kind == DENSE else 'Mixture-of-Experts'} model, "
            f"and the method is for {' and '.join(method.fits)} ones. `metier methods` shows what fits."
        )
    if method.is_prompt and is_encoder_decoder(model):
        raise UnsupportedModelError(f"{method.name}: {type(model).__name__} is an encoder-decoder; it needs a decoder.")


def target_parts(method: Method, config: RunConfig, model: PreTrainedModel) -> tuple[str, ...]:
    """Parts of the layers that the method goes on: those that the run names, or the method's own that the model has."""
    if config.target_parts is not None:
        return config.target_parts
    there = part_paths(model)
    return tuple(part for part in method.default_targets(is_moe="routed" in there) if part in there)


def adapter_config(model: PreTrainedModel, config: RunConfig) -> peft.PeftConfig:
    """The method's configuration: its defaults, then what follows from the model, then what the run says.

    Raises:
        ConfigError: options that do not go together.
    """
    method = method_of(config.method)
    kind, parts = config_class(method), target_parts(method, config, model)
    known = {field.name for field in dataclasses.fields(kind)}
    options: dict[str, Any] = dict(method.defaults)
    options |= {name: getattr(config, name) for name in _OF_A_RUN if name in known and name not in method.defaults}
    if _has_rank(method):
        options["r"] = _rank(config)
    if unused := [name for name in config.lora_keys_set if name not in lora_keys_of(method)]:
        raise ConfigError(
            f"{', '.join(unused)}: {method.name} has no such option. `metier methods {method.name}` shows its own."
        )
    given = {name: value for name, value in config.method_options.items() if name in known}
    _refuse_unprepared(method, given)
    if parts:
        options["target_modules"] = modules_of(model, parts)
    elif method.targets and "target_modules" not in given:
        there = part_paths(model)
        usual = method.default_targets(is_moe="routed" in there)
        raise UnsupportedModelError(
            f"{method.name}: {type(model).__name__} has none of the parts that it usually goes on, "
            f"{', '.join(usual)}. Name some of its {', '.join(there)} by `targets`."
        )
    if method.fill is not None:
        module, _, name = method.fill.partition(":")
        fill = getattr(importlib.import_module(module), name)
        of_run = {"target_parts": parts, "names_modules": _names_modules(config), "lora_r": config.lora_r}
        options |= fill(model, {**options, **given, **of_run})
    for name in ("target_modules", "target_parameters"):
        if isinstance(options.get(name), list):
            options[name] = _in_layers(options[name], given.get("layers_to_transform"))
    options |= given
    if "task_type" in known:
        options["task_type"] = "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    try:
        return kind(**options)
    except MetierError:
        raise
    except ImportError as error:
        raise _missing(method, error) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{method.name}: {first_line(error)}") from error


def lora_keys_of(method: Method) -> set[str]:
    """Those keys of a run for LoRAs that the method reads."""
    if method.config is None:
        return set(LORA_KEYS) if method.name == "expert_lora" else set()
    known = {field.name for field in dataclasses.fields(config_class(method))}
    # as a rank a run has lora_r for all of them
    used = {name for name in LORA_KEYS if name in known and name not in method.defaults}
    return used | ({"lora_r"} if _has_rank(method) or method.name == "adalora" else set())


def _has_rank(method: Method) -> bool:
    """Whether its `r` is the rank of a LoRA, which a run calls `lora_r`."""
    known = {field.name for field in dataclasses.fields(config_class(method))}
    return "lora_alpha" in known and "r" in known and "r" not in method.defaults


def _missing(method: Method, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{method.name}: a package is missing: {first_line(error)}\nInstall it: pip install 'metier[{method.name}]'."
    )


def _names_modules(config: RunConfig) -> bool:
    """Whether the run names modules or parameters as PEFT has it, and not parts of the layers."""
    return bool({"target_modules", "target_parameters"} & config.method_options.keys())


def _in_layers(paths: list[str], layers: int | list[int] | None) -> list[str]:
    """Modules or parameters of some decoder layers; PEFT passes over that option where it is given whole paths."""
    if layers is None:
        return paths
    wanted = {layers} if isinstance(layers, int) else set(layers)
    return [path for path in paths if index_of_owner(path) in wanted]


_UNPREPARED = {
    "init_lora_weights": ("eva", "corda", "lora_ga", "loftq"),
    "use_asa": (True,),
}


def _refuse_unprepared(method: Method, given: Mapping[str, Any]) -> None:
    """Raise a ConfigError for what PEFT has calls of its own for, without which it would do nothing."""
    for name, values in _UNPREPARED.items():
        if given.get(name) in values:
            raise ConfigError(
                f"{method.name}: {name}: {given[name]} needs calls of PEFT that a run does not make, and would do "
                "nothing. Leave it out, or make the adapter with PEFT itself."
            )
    if str(given.get("init_lora_weights")).startswith("pissa_niter_"):
        raise ConfigError(
            f"{method.name}: init_lora_weights: {given['init_lora_weights']} draws at random again when the adapter is "
            "loaded, and would be put on another base than it was trained on. Use pissa."
        )
    if given.get("monteclora_config") is not None:
        raise ConfigError(f"{method.name}: monteclora_config adds to a loss that a run does not take. Leave it out.")


def _rank(config: RunConfig) -> int:
    """`r`, as PEFT calls it, or `lora_r`, as a run has it for all its LoRAs."""
    if "r" not in config.method_options:
        return config.lora_r
    rank: int = config.method_options["r"]
    if config.lora_r not in (rank, RunConfig.__dataclass_fields__["lora_r"].default):
        raise ConfigError(f"r: got {rank}, but lora_r is {config.lora_r}. Leave one of them out.")
    return rank
