"""A model whose floating-point tensors have shapes and no numbers, and whose integers are real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metier.memory.frozen_weight import FrozenWeight
from metier.memory.step_gradients import step_gradients_of
from metier.methods.expert_layer import ExpertTunerLayer
from metier.methods.meft import MeftLayer
from metier.methods.sparse_delta import SparseDeltaLayer
from metier.methods.sparse_delta.masks.shares import evenly_spaced
from metier.planning.from_config import Skeleton


def fill_ids(model: nn.Module, skeleton: Skeleton) -> None:
    """Which experts or entries an adapter has is real, as all integers are; so is the order of a prompt's tokens."""
    prompts = getattr(model, "prompt_tokens", {})
    for name, tokens in prompts.items():
        prompts[name] = torch.arange(len(tokens))
    for module in model.modules():
        if isinstance(module, ExpertTunerLayer) and skeleton.selection is not None:
            ids = getattr(module, module.ids_name)
            for name in ids:
                ids[name] = torch.tensor(skeleton.selection.experts[module.layer_index])
        _fill_integers(module)


def _fill_integers(module: nn.Module) -> None:
    """What else a module has of integers, in buffers or in plain attributes, begins as 0: a place that there is."""
    for holder in (module._buffers, module.__dict__, *(x for x in vars(module).values() if type(x) is dict)):
        for name, value in holder.items():
            if isinstance(value, Tensor) and value.is_meta and not value.is_floating_point():
                holder[name] = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
    if isinstance(module, SparseDeltaLayer):
        for name in module.names:
            for adapter, indices_M in module.indices_of(name).items():
                module.indices_of(name)[adapter] = evenly_spaced(module.size_of(name), len(indices_M))
                module.entries_are_known(adapter)


def show_entries(model: nn.Module) -> None:
    """Have a sparse delta's entries stand in the base, as they do from when it is made, and be written in a step."""
    for module in model.modules():
        if isinstance(module, SparseDeltaLayer):
            module.show()
            module.train()


class _Decoded:
    """As a store of frozen weights: what is read is made anew."""

    tier = "device"

    def __init__(self, weight: nn.Parameter, base_format: str | None) -> None:
        self.name, self.shape, self.dtype = "a frozen weight", tuple(weight.shape), weight.dtype
        self.is_one_by_one = base_format == "nf4"

    def read(self, first: int, last: int, _: torch.device) -> Tensor:
        found = torch.empty(last - first, *self.shape[-2:], dtype=self.dtype)
        if self.is_one_by_one and last - first > 1:
            torch.empty(*self.shape[-2:], dtype=self.dtype)  # each is copied to its place
        return found

    def read_some(self, indices: Sequence[int], _: torch.device) -> list[Tensor]:
        return [torch.empty(*self.shape[-2:], dtype=self.dtype) for _ in indices]


def _frozen(weight: nn.Parameter, base_format: str | None) -> nn.Parameter:
    store: Any = _Decoded(weight, base_format)
    is_matrix = weight.dim() == 2
    found = FrozenWeight(store, 0, 1 if is_matrix else weight.shape[0], is_matrix=is_matrix)
    return nn.Parameter(found, requires_grad=False)


def without_numbers(
    model: nn.Module, decoded: Sequence[nn.Parameter] = (), base_format: str | None = None
) -> FakeTensorMode:
    """Make every parameter and every floating-point buffer fake, shared ones as shared as they were.

    Args:
        model: on the meta device.
        decoded: frozen weights that are read back from a format of fewer bits whenever they are needed.
        base_format: which that is.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {id(weight): (_frozen(weight, base_format), weight) for weight in decoded}

    def faked(tensor: Tensor) -> Tensor:
        converter = fake.fake_tensor_converter
        return converter.from_meta_and_device(fake, tensor.detach(), torch.device("cpu"))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                # the old one is kept too, so that no other gets its id
                new = nn.Parameter(faked(parameter), requires_grad=parameter.requires_grad)
                made[id(parameter)] = (new, parameter)
                gradients = step_gradients_of(parameter)
                if gradients is not None:
                    gradients.holder = new
                    new.step_gradients = gradients  # type: ignore[attr-defined]
            module._parameters[name] = made[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = faked(buffer)
        for store in module.stores.values() if isinstance(module, MeftLayer) else ():
            rows = store.arrays["rows"]
            store.arrays["rows"] = faked(rows)
            if store.tier == "disk":
                # it would be made as a file
                store.gradients = faked(torch.empty_like(rows, dtype=torch.float32))
    return fake


def gradient_rooms(model: nn.Module, fake: FakeTensorMode) -> list[Tensor]:
    """Where rows of a sparse adapter have their gradients: room that is there from the second step on."""
    found = (step_gradients_of(parameter) for parameter in model.parameters())
    with fake:
        return [gradients.reserve(torch.device("cpu")) for gradients in found if gradients is not None]


def originals(model: nn.Module) -> list[Tensor]:
    """What stood in the base where a sparse delta's entries stand."""
    layers = [module for module in model.modules() if isinstance(module, SparseDeltaLayer)]
    return [kept for layer in layers for place in layer.places.values() if (kept := place.originals) is not None]
