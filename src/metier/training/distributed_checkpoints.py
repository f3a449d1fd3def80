"""Checkpoints of a run in several processes, by torch.distributed.checkpoint: resumed by any number of processes.

Each process writes its part of what is trained and of the optimizer's state, by the parameters' names, and reads the
part that is then its own. One process writes the trainer's own files, which several read too: replicas whole, shards
their part. What is frozen is in neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.serialization import config as serialization
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from metier.distributed.ranks import ranks_here
from metier.memory.step_gradients import step_gradients_of
from metier.methods.sparse_delta import SparseDeltaLayer
from metier.training.bare_optimizer import bare_optimizer

STATE = "distributed"
"""The folder in a checkpoint."""


def keep_by_ranks(trainer: Trainer, checkpoint: Path | None) -> None:
    """Have the trainer write its checkpoints from all processes, and read those of another number of processes.

    Args:
        trainer: before it trains.
        checkpoint: from which it will go on.
    """
    own = {name: getattr(trainer, name) for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler")}

    def load_model(path: str, model: nn.Module | None = None) -> None:
        if (Path(path) / STATE).is_dir():
            trained = trainer.model if model is None else model
            if any(isinstance(module, SparseDeltaLayer) for module in trained.modules()):
                # which entries its values are for, only the adapter's file beside them says
                own["_load_from_checkpoint"](path, model)
            _load_trained(trained, Path(path))
        elif not trainer.is_fsdp_enabled:
            with _read_into_host_memory(trainer.model if model is None else model):
                own["_load_from_checkpoint"](path, model)

    def load_optimizer(path: str | None) -> None:
        if path is not None and (Path(path) / STATE).is_dir():
            _load_optimizer_state(trainer.model, bare_optimizer(trainer.optimizer), Path(path))
        elif path is not None and (trainer.is_fsdp_enabled or _has_rows(trainer, path)):
            _load_whole_optimizer(bare_optimizer(trainer.optimizer), Path(path))
        else:
            own["_load_optimizer_and_scheduler"](path)
            return
        trainer.lr_scheduler.load_state_dict(torch.load(Path(path) / SCHEDULER_NAME, weights_only=True))

    trainer._load_from_checkpoint, trainer._load_optimizer_and_scheduler = load_model, load_optimizer
    if trainer.is_fsdp_enabled and checkpoint is not None and not (checkpoint / STATE).is_dir():
        # whole tensors, into a model that is not sharded yet
        with _read_into_host_memory(trainer.model):
            own["_load_from_checkpoint"](str(checkpoint))
    if ranks_here().are_several:
        trainer._save_optimizer_and_scheduler = lambda folder: _save(trainer, Path(folder))


def _has_rows(trainer: Trainer, path: str) -> bool:
    """Whether several processes train rows: the trainer itself would read all of their state to a device."""
    is_saved = (Path(path) / OPTIMIZER_NAME).is_file()
    return ranks_here().are_several and is_saved and _has_stores(bare_optimizer(trainer.optimizer))


@contextmanager
def _read_into_host_memory(model: nn.Module) -> Iterator[None]:
    """PEFT reads an adapter's file to the accelerator, where rows that live elsewhere may have no room."""
    if not isinstance(model, PeftModel) or not any(map(step_gradients_of, model.parameters())):
        yield
        return
    model.load_adapter = partial(model.load_adapter, torch_device="cpu")
    try:
        yield
    finally:
        del model.load_adapter


def _save(trainer: Trainer, folder: Path) -> None:
    optimizer = bare_optimizer(trainer.optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    if not _has_stores(optimizer):
        state = {
            "model": get_model_state_dict(trainer.model, options=_TRAINED),
            "optimizer": get_optimizer_state_dict(trainer.model, optimizer, options=_TRAINED),
        }
        save(state, checkpoint_id=folder / STATE)
    elif ranks_here().is_main:
        # replicas: what one process has is what all have; the trainer itself saves a model that is not sharded
        if trainer.is_fsdp_enabled:
            trainer._save(str(folder))
        torch.save(optimizer.state_dict(), folder / OPTIMIZER_NAME)
    if ranks_here().is_main:
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def _load_trained(model: nn.Module, checkpoint: Path) -> None:
    state = {"model": get_model_state_dict(model, options=_TRAINED)}
    _load(state, checkpoint)
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))


def _load_optimizer_state(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=_TRAINED)}
    _load(state, checkpoint)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_TRAINED)


def _load(state: dict[str, Any], checkpoint: Path) -> None:
    # its parts are read from streams, which cannot be mapped
    with serialization.patch("load.mmap", False):  # type: ignore[attr-defined]
        load(state, checkpoint_id=checkpoint / STATE)


def _load_whole_optimizer(optimizer: Optimizer, checkpoint: Path) -> None:
    """The state that one process has saved, each tensor parted as its parameter is."""
    whole = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [number for group in whole["param_groups"] for number in group["params"]]
    for number, parameter in zip(order, parameters, strict=True):
        if number in whole["state"]:
            state = whole["state"][number]
            whole["state"][number] = {name: _parted(value, parameter) for name, value in state.items()}
    optimizer.load_state_dict(whole)


def _parted(value: Any, like: torch.Tensor) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _has_stores(optimizer: Optimizer) -> bool:
    return any(step_gradients_of(parameter) for group in optimizer.param_groups for parameter in group["params"])


_TRAINED = StateDictOptions(ignore_frozen_params=True)
