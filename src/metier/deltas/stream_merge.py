"""Merge a delta into a base's files without loading the base: copy them, and write over what changes, layer by layer.

A checkpoint's files seldom hold what the model has in memory: transformers stacks single experts and joins gate and up
when it loads. The way back is transformers' own (`revert_weight_conversion`), which moves values without computing with
them. So a layer's new values, and beside them a mask of what is new, are sent through it, and arrive under the files'
names and shapes. Only one layer's values are in memory at a time.
"""

# E experts of the base, k selected experts of a layer

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from metier.deltas.changes import Rows, changed_parameters, low_rank_change
from metier.deltas.checkpoint_files import INDEX, CheckpointFiles, copy_beside
from metier.deltas.read import Delta
from metier.models.fingerprint import router_tensors
from metier.models.moe import MoELayer, moe_layers


class CannotStreamError(Exception):
    """Why these files have to be merged through a loaded model; caught by `merge`."""


@dataclass(frozen=True, slots=True)
class _Change:
    """New values of one of the model's parameters."""

    value: Tensor
    is_new: Tensor
    """uint8, of the same shape: 1 where the value counts."""
    is_added: bool
    """The value is added to what is there, in float32, instead of taking its place."""


def load_routers(model: PreTrainedModel, files: CheckpointFiles) -> None:
    """Give a skeleton its routers' values, which its fingerprint is made of.

    Raises:
        CannotStreamError: a router's tensor is not in the files as it is in the model.
    """
    for layer in moe_layers(model):
        for name, tensor in list(router_tensors(model, layer)):
            stored = revert_weight_conversion(model, {name: tensor.detach()})
            if len(stored) != 1 or tuple(next(iter(stored.values())).shape) != tuple(tensor.shape):
                raise CannotStreamError(f"{name} is stored in another form")
            (file_name,) = stored
            value = files.read(_known(files, file_name, tuple(tensor.shape)))
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            if last in module._parameters:
                module._parameters[last] = nn.Parameter(value.to(tensor.dtype), requires_grad=False)
            else:
                module._buffers[last] = value.to(tensor.dtype)


def stream_merge(delta: Delta, model: PreTrainedModel, files: CheckpointFiles, folder: Path) -> None:
    """Write the base's files with a delta's changes into an empty folder.

    Args:
        delta: one that was found to fit `model`.
        model: the base's skeleton.
        files: the base's.
        folder: gets the weights and every other file of the base's folder but its card.

    Raises:
        CannotStreamError: the files hold a changed tensor in a form that cannot be written over.
    """
    for name in (*files.file_names(), *([INDEX] if (files.folder / INDEX).is_file() else [])):
        shutil.copyfile(files.folder / name, folder / name)
    copy_beside(files.folder, folder)
    for changes in _by_part(delta, model):
        _write(changes, model, files, folder)


def _by_part(delta: Delta, model: PreTrainedModel) -> Iterator[dict[str, _Change]]:
    """Changes by parameter name: one layer's experts at a time, then one whole module at a time."""
    rows = delta.load_rows()
    for layer in moe_layers(model):
        if layer.index in delta.config.experts:
            names = changed_parameters(delta, layer)
            yield {f"{layer.path}.{name}": _expert_change(delta, rows, layer, name) for name in names}
    for path, values in delta.load_whole().items():
        yield {f"{path}.{n}": _Change(v, torch.ones(v.shape, dtype=torch.uint8), False) for n, v in values.items()}


def _expert_change(delta: Delta, rows: Rows, layer: MoELayer, name: str) -> _Change:
    ids = list(delta.config.experts[layer.index])
    is_added = delta.config.low_rank is not None
    own = low_rank_change(delta, rows, layer, name) if is_added else rows[layer.index][name]
    shape = getattr(layer.experts, name).shape
    value_E, is_new_E = torch.zeros(shape, dtype=own.dtype), torch.zeros(shape, dtype=torch.uint8)
    value_E[ids] = own
    is_new_E[ids] = 1
    return _Change(value_E, is_new_E, is_added)


@torch.no_grad()
def _write(changes: dict[str, _Change], model: PreTrainedModel, files: CheckpointFiles, folder: Path) -> None:
    is_added = any(change.is_added for change in changes.values())
    values = revert_weight_conversion(model, {name: change.value for name, change in changes.items()})
    masks = revert_weight_conversion(model, {name: change.is_new for name, change in changes.items()})
    for name, value in values.items():
        is_new = masks[name].bool()
        _known(files, name, tuple(value.shape))
        if not is_new.any():
            continue
        dtype = files.dtype(name)
        if dtype is None:
            raise CannotStreamError(f"{name} is stored as {files.tensors[name][1].dtype}")
        if is_added or not is_new.all():
            before = files.read(name)
            value = (before.float() + value).to(dtype) if is_added else value.to(dtype)
            value = torch.where(is_new, value, before)
        files.overwrite(folder, name, value.to(dtype))


def _known(files: CheckpointFiles, name: str, shape: tuple[int, ...]) -> str:
    if name not in files.tensors or files.tensors[name][1].shape != shape:
        raise CannotStreamError(f"the base's files have no {name} of shape {list(shape)}")
    return name
