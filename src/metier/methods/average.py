"""Average adapters into a new one (AdapterSoup, arXiv:2302.07027), of whatever method they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import peft
import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from metier.errors import ConfigError

_NOT_COMPARED = {"base_model_name_or_path", "inference_mode", "revision", "task_type", "auto_mapping", "peft_version"}
"""Fields of a configuration that say nothing of what an adapter computes."""
_SUM_TOLERANCE = 1e-6
"""Weights such as three times 1/3 do not sum to 1 in the last bit."""


def average_adapters(
    model: peft.PeftModel, names: Sequence[str], weights: Sequence[float] | None = None, new_name: str = "average"
) -> None:
    """Add an adapter whose parameters are the weighted mean of other adapters' parameters.

    It computes as one adapter does, whatever the number of adapters in it. Parameters are averaged, not what they
    compute: of a LoRA the two factors each, as in the paper. The new adapter is not made the active one.

    Args:
        model: with all of the adapters on it.
        names: of the adapters, at least one.
        weights: one a name, which sum to 1; None for equal ones.
        new_name: of the average.

    Raises:
        ConfigError: an adapter that does not exist, a name that is taken, weights that do not fit, or configurations
            or shapes that differ; says which is the first difference.

    Paper: AdapterSoup, arXiv:2302.07027.
    """
    shares = _shares(model, names, weights, new_name)
    for name in names[1:]:
        _check_configs(model.peft_config, names[0], name)
    states = [_state(model, name) for name in names]
    for name, state in zip(names[1:], states[1:], strict=True):
        _check_shapes(names[0], states[0], name, state)
    averaged = {key: _mean(key, [state[key] for state in states], shares) for key in states[0]}
    model.add_adapter(new_name, copy.deepcopy(model.peft_config[names[0]]))
    set_peft_model_state_dict(model, averaged, adapter_name=new_name)


def _shares(model: peft.PeftModel, names: Sequence[str], weights: Sequence[float] | None, new_name: str) -> list[float]:
    known = model.peft_config
    missing = [name for name in names if name not in known]
    if not names or missing:
        got = f"no adapter {missing[0]!r}" if missing else "no names"
        raise ConfigError(f"average_adapters: got {got}, expected some of the model's: {', '.join(known)}.")
    if new_name in known:
        raise ConfigError(f"average_adapters: new_name: the model already has an adapter {new_name!r}; choose another.")
    if weights is None:
        return [1 / len(names)] * len(names)
    if len(weights) != len(names):
        raise ConfigError(f"average_adapters: got {len(weights)} weights for {len(names)} names, expected one each.")
    if not math.isclose(math.fsum(weights), 1, abs_tol=_SUM_TOLERANCE):
        raise ConfigError(f"average_adapters: weights must sum to 1, got {list(weights)}: {math.fsum(weights):g}.")
    return list(weights)


def _check_configs(configs: dict[str, PeftConfig], first: str, other: str) -> None:
    one, two = configs[first].to_dict(), configs[other].to_dict()
    for field in sorted((one.keys() | two.keys()) - _NOT_COMPARED):
        a, b = _comparable(one.get(field)), _comparable(two.get(field))
        if a != b:
            raise ConfigError(
                f"average_adapters: adapters '{first}' and '{other}' differ in {field}: {a!r} and {b!r}.\n"
                "Only adapters of one configuration, trained on one base, can be averaged."
            )


def _comparable(value: object) -> object:
    return sorted(value, key=str) if isinstance(value, list | set | tuple) else value


def _state(model: peft.PeftModel, name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state


def _check_shapes(first: str, one: dict[str, Tensor], other: str, two: dict[str, Tensor]) -> None:
    for key in sorted(one.keys() | two.keys()):
        a, b = (tuple(state[key].shape) if key in state else None for state in (one, two))
        if a != b:
            raise ConfigError(f"average_adapters: adapters '{first}' and '{other}' differ in {key}: {a} and {b}.")


def _mean(key: str, tensors: list[Tensor], shares: list[float]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():  # such as the ids of the experts that an adapter trains
        if not all(torch.equal(first, tensor) for tensor in tensors[1:]):
            raise ConfigError(f"average_adapters: {key} differs between the adapters, and integers have no average.")
        return first
    total = torch.zeros_like(first, dtype=torch.float32)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.detach().float(), alpha=share)
    return total.to(first.dtype)
