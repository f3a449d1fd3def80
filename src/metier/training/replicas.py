"""What lies in stores, and what is trained beside shards, in several processes: each has a replica, kept the same.

Why replicas, and not a share of the rows in each process: which rows a token needs is known only when its layer is
reached, so a share would put an exchange of rows before every layer of both passes; replicas exchange gradients once a
step, of the rows that were used and no others. What it costs is host memory, which is what a sparse adapter assumes to
be plenty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from metier.distributed.ranks import ranks_here
from metier.errors import RunError
from metier.memory.frozen_weight import FrozenWeight
from metier.memory.step_gradients import StepGradients, step_gradients_of
from metier.methods.meft.layer import MeftLayer


def keep_replicas(trainer: Trainer) -> None:
    """Have what DDP and FSDP2 leave alone be the same in all processes, before the first step and after each: a sparse
    adapter's rows and routers, and frozen weights in a store, which each process has read from the same files.

    Raises:
        RunError: they differ already.
    """
    if not ranks_here().are_several:
        return
    layers = {path: module for path, module in trainer.model.named_modules() if isinstance(module, MeftLayer)}
    if not trainer.is_fsdp_enabled:
        names = [f"{path}.meft_gradients.{name}" for path, layer in layers.items() for name in layer.meft_gradients]
        _leave_to_replicas(trainer.model, names)
    if layers:
        _keep_rows(trainer, layers.values())


def _leave_to_replicas(model: nn.Module, names: list[str]) -> None:
    """Have DDP neither send nor average what has these names, nor what lies in a store and cannot be written."""
    parameters = model.named_parameters(remove_duplicate=False)
    stored = [name for name, parameter in parameters if isinstance(parameter, FrozenWeight)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*names, *stored])


def _keep_rows(trainer: Trainer, layers: Collection[MeftLayer]) -> None:
    for layer in layers:
        for store in layer.stores.values():
            _check_same(store.rows_NMWD, store.name)
    if trainer.is_fsdp_enabled:
        held = [part for layer in layers for part in (layer.meft_gradients, layer.meft_router)]
        trainer.accelerator.state.fsdp_plugin.ignored_modules = held
        _keep_in_optimizer(trainer, {id(parameter) for module in held for parameter in module.parameters()})
    _average_after_backward(trainer)


def _average_after_backward(trainer: Trainer) -> None:
    """Before anything looks at a step's gradients, those that neither DDP nor FSDP2 averages are averaged."""
    plain = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = plain(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            for parameter in _trained(trainer):
                gradients = step_gradients_of(parameter)
                if isinstance(gradients, StepGradients):
                    gradients.average_over_ranks()
                elif trainer.is_fsdp_enabled and not isinstance(parameter, DTensor) and parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= ranks_here().size
        return loss

    trainer.training_step = training_step


def _trained(trainer: Trainer) -> Iterator[nn.Parameter]:
    for group in trainer.optimizer.param_groups:
        yield from group["params"]


def _keep_in_optimizer(trainer: Trainer, kept: set[int]) -> None:
    """Have an optimizer keep parameters that are not sharded: accelerate finds them again by their memory, and what
    stands for rows has none."""
    plain = trainer.accelerator.prepare

    def prepare(*args: Any, **kwargs: Any) -> Any:
        optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
        before = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        prepared = plain(*args, **kwargs)
        for optimizer, groups in zip(optimizers, before, strict=True):
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                pairs = zip(parameters, group["params"], strict=True)
                group["params"] = [old if id(old) in kept else new for old, new in pairs]
        return prepared

    trainer.accelerator.prepare = prepare


def _check_same(rows: Tensor, name: str) -> None:
    mine = rows.float().sum(dtype=torch.float64).cpu()
    of_all: list[Any] = [None] * ranks_here().size
    dist.all_gather_object(of_all, float(mine))
    if len(set(of_all)) > 1:
        raise RunError(
            f"{name}: its rows add up to {', '.join(map(str, of_all))} in the {len(of_all)} processes, expected the "
            "same in all. Start them with one seed and one checkpoint."
        )
