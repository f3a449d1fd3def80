"""Load a model whose large weights go somewhere else, one at a time, so that they are never all in memory.

transformers converts and writes weights that its `device_map` sends to the disk one by one, and leaves hooks that fetch
them whole before each forward pass. Here the hooks are asked once for each weight and then removed.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from metier.errors import ModelError, RowStoreError, UnsupportedModelError
from metier.models.contract import contract_flags
from metier.models.foreign import can_follow_contract
from metier.models.spellings import LAYER_INDEX, OTHER_MODALITY, ROUTER_NAMES, SHARED_GATE_NAMES

_ON_DISK = "disk"
_ROUTERS = frozenset((*ROUTER_NAMES, *SHARED_GATE_NAMES))
_IN_FLOAT32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Where a transformers model has patterns of such parameters' names."""


class WeightPlace(Protocol):
    """Where the large weights of a model go."""

    @property
    def folder(self) -> Path:
        """For files that are in the way from one format to another; it goes after loading."""
        ...

    def put(self, name: str, layer: int, weight: Tensor) -> nn.Parameter:
        """Take on a weight, (outputs, inputs) or (num_experts, …), and give what the model is to have instead.

        Args:
            name: in the model.
            layer: number in the module's path.
            weight: is not kept by the caller.
        """
        ...


def large_modules(model: nn.Module) -> dict[str, int]:
    """Paths of the linear layers and stacks of experts inside numbered layers, routers and all that is in them aside;
    and the layers' numbers.

    Embeddings and the output layer are not among them, nor is what a text never passes through, nor what transformers
    keeps in float32 in some dtype.
    """
    found = {}
    patterns = chain.from_iterable(getattr(model, name, None) or () for name in _IN_FLOAT32)
    in_float32 = [pattern.replace("*", ".*") for pattern in patterns]
    for path, module in model.named_modules():
        numbers = LAYER_INDEX.findall(path)
        if not numbers or OTHER_MODALITY.search(path) or _ROUTERS.intersection(path.split(".")):
            continue
        if any(re.search(pattern, f"{path}.weight") for pattern in in_float32):
            continue
        if isinstance(module, nn.Linear | Conv1D) or contract_flags(module) is not None:
            found[path] = int(numbers[-1])
    return found


def is_large_weight(name: str, weight: Tensor) -> bool:
    """Whether a parameter of such a module is one of its weights, and no bias."""
    return weight.dim() > 1 and name.rpartition("_")[2] != "bias"


def from_pretrained_by_weight(
    network_class: Any, target: str, config: PreTrainedConfig, place: WeightPlace, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """As `network_class.from_pretrained` with its loading information, the large weights put in their place.

    Raises:
        UnsupportedModelError: the model's experts are made anew after they are loaded, and so pass through memory; or
            it has no large weights.
        RowStoreError: the disk has no room for weights that have to be converted.
        ModelError: a weight of the checkpoint has another shape than the model's.
    """
    with torch.device("meta"):
        skeleton = network_class.from_config(config, **_code_options(network_class, config, options))
    if can_follow_contract(skeleton):
        raise UnsupportedModelError(
            f"{target}: the experts of {type(skeleton).__name__} are stacked by metier after they are loaded, so they "
            "cannot be loaded weight by weight.\nLoad the model without a store for its weights."
        )
    modules = large_modules(skeleton)
    if not modules:
        raise UnsupportedModelError(
            f"{target}: {type(skeleton).__name__} has no linear layers or experts inside numbered layers, so nothing "
            "of it could go into a store.\nLoad the model without a store for its weights."
        )
    device_map = dict(_device_map(skeleton, "", modules))
    del skeleton
    with _quiet("accelerate.big_modeling"):
        with _told_of_full_disk(place.folder):
            network, info = network_class.from_pretrained(
                target,
                device_map=device_map,
                offload_folder=str(place.folder),
                output_loading_info=True,
                **options,
            )
        if info["missing_keys"]:  # the caller says which
            return network, info
        for path, layer in modules.items():
            _move(network.get_submodule(path), path, layer, place, target)
    for module in network.modules():
        remove_hook_from_module(module)
        # a module that holds its own method would stay in memory until cycles are collected
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    # what was loaded as it lies in a file holds the whole file
    for tensor in chain(network.parameters(), network.buffers()):
        if type(tensor) in (nn.Parameter, Tensor):
            tensor.data = tensor.data.clone()
    # accelerate's marks of a model that is spread over devices, which trainers would not touch
    vars(network).pop("hf_device_map", None)
    for name in ("to", "cuda", "npu", "xpu"):
        vars(network).pop(name, None)
    return network, info


def _code_options(network_class: Any, config: PreTrainedConfig, options: dict[str, Any]) -> dict[str, Any]:
    """For a model whose code lies beside its weights: the code of the very revision, as `from_pretrained` takes it."""
    trusted = options.get("trust_remote_code", False)
    code = getattr(config, "auto_map", {}).get(network_class.__name__, "--")
    is_in_same_repository = "--" not in code
    if trusted and is_in_same_repository and "revision" in options:
        return {"trust_remote_code": trusted, "code_revision": options["revision"]}
    return {"trust_remote_code": trusted}


@contextmanager
def _told_of_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise RowStoreError(
            f"{folder}: cannot hold the weights that are converted while the model is loaded "
            f"({os.strerror(errno.ENOSPC)}); they are removed again.\n"
            "Make room on the disk, or name a folder on another one: base_folder."
        ) from error


def _device_map(module: nn.Module, path: str, on_disk: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every module or tensor with its device; of what holds modules that go to the disk, the parts are named."""
    if path in on_disk:
        yield path, _ON_DISK
    elif path and not any(name.startswith(f"{path}.") for name in on_disk):
        yield path, "cpu"
    else:
        start = f"{path}." if path else ""
        for name, _ in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            yield f"{start}{name}", "cpu"
        for name, child in module.named_children():
            yield from _device_map(child, f"{start}{name}", on_disk)


def _move(module: nn.Module, path: str, layer: int, place: WeightPlace, target: str) -> None:
    """The weights of one module go to their place; its biases, and what modules it holds have, stay in memory."""
    for inner_path, inner in module.named_modules():
        owner = f"{path}.{inner_path}" if inner_path else path
        for name, empty in list(inner.named_parameters(recurse=False)):
            value: Tensor = vars(inner)["_hf_hook"].weights_map[name]
            if value.shape != empty.shape:
                raise ModelError(
                    f"{target}: {owner}.{name} has shape {list(value.shape)} in the checkpoint, expected "
                    f"{list(empty.shape)} by its config.json.\nFetch the checkpoint again, or its own config.json."
                )
            is_large = inner is module and is_large_weight(name, value)
            filled = place.put(f"{owner}.{name}", layer, value) if is_large else nn.Parameter(value.clone())
            filled.requires_grad_(False)
            inner._parameters[name] = filled
            del value
            # what had to be converted was written there; what had not is in the checkpoint itself
            (place.folder / f"{owner}.{name}.safetensors").unlink(missing_ok=True)


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Without a logger's warnings: this one says of every such model that parameters are on no device."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # tensors may be named there, but it looks for modules alone
            warnings.filterwarnings("ignore", message=".*device_map keys do not match any submodules")
            yield
    finally:
        logger.setLevel(level)
