"""Every parameter of a base model by what it is: the list from which a method chooses what to train.

Seen through PEFT's wrappers, under the base's own names; a tied parameter stands once, with its other places beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from metier.models.contract import contract_flags
from metier.models.spellings import LAYER_INDEX, OTHER_MODALITY, ROUTER_NAMES, SHARED_GATE_NAMES
from metier.models.unwrap import bare_model, original_module

Kind = Literal["linear", "experts", "bias", "norm", "router", "embedding", "output", "other"]
"""`linear`: weights of linear layers inside decoder layers. `experts`: stacked expert weights. `bias`: biases of
linear layers and of stacked experts. `norm`: weights and biases of norms. `router`: all that a router (or a shared
expert's gate) holds. `embedding`: of tokens and positions. `output`: linear layers outside the decoder layers, such as
the output layer. `other`: what remains, such as a Mamba layer's state matrix, and all of another modality."""
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BaseParameter:
    """One parameter of the base."""

    path: str
    """In the bare model, such as `model.layers.1.mlp.experts.down_proj`, wrapped by PEFT or not."""
    owner: nn.Module
    """The base's own module that holds it."""
    name: str
    """In `owner`."""
    kind: Kind
    layer: int | None
    """The decoder layer's number in its stack; None outside of all."""
    parameter: nn.Parameter
    also_at: tuple[str, ...] = ()
    """The other paths of a tied parameter."""

    @property
    def module_path(self) -> str:
        return self.path.rpartition(".")[0]


def base_parameters(model: nn.Module) -> list[BaseParameter]:
    """Every parameter of the base, in the model's order.

    Args:
        model: bare, or wrapped by PEFT, whose own parameters are left out.
    """
    places: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
    for path, module in base_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((f"{path}.{name}" if path else name, module, name, parameter))
    return [
        BaseParameter(
            path=found[0][0],
            owner=found[0][1],
            name=found[0][2],
            kind=_kind(found[0][0].rpartition(".")[0], found[0][1], found[0][2]),
            layer=language_layer_index(found[0][0]),
            parameter=found[0][3],
            also_at=tuple(path for path, *_ in found[1:]),
        )
        for found in places.values()
    ]


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The base's own modules by their path in the bare model, whatever PEFT has put around them."""
    module = original_module(bare_model(model))
    yield prefix, module
    for name, child in module.named_children():
        yield from base_modules(child, f"{prefix}.{name}" if prefix else name)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside decoder layers, by path; routers are none of them."""
    return {
        path: module
        for path, module in base_modules(model)
        if path and isinstance(module, nn.Linear) and _kind(path, module, "weight") == "linear"
    }


def language_layer_index(path: str) -> int | None:
    """The number of the decoder layer that `path` lies in; None outside of all, and in another modality."""
    found = LAYER_INDEX.findall(path)
    return int(found[-1]) if found and not OTHER_MODALITY.search(path) else None


def _kind(path: str, module: nn.Module, name: str) -> Kind:
    last = path.rpartition(".")[2]
    if OTHER_MODALITY.search(path):
        return "other"
    if last in ROUTER_NAMES or last in SHARED_GATE_NAMES:
        return "router"
    if contract_flags(module) is not None:
        return "bias" if name.endswith("_bias") else "experts"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "Norm" in type(module).__name__:
        return "norm"
    if not isinstance(module, nn.Linear | Conv1D):
        return "other"
    if name == "bias":
        return "bias"
    return "linear" if language_layer_index(f"{path}.{name}") is not None else "output"
