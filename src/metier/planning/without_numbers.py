"""A model whose floating-point tensors have shapes and no numbers, and whose integers are real."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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


def without_numbers(model: nn.Module) -> FakeTensorMode:
    """Make every parameter and every floating-point buffer fake, shared ones as shared as they were."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

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
