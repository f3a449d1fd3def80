"""An optimizer in which groups of whole modules have learning rates of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from metier.methods.whole_module import COPIES, WholeModule, whole_modules
from metier.models.groups import group_paths


def set_learning_rates(trainer: Trainer, model: nn.Module, rates: dict[str, float]) -> None:
    """Make the trainer's own optimizer, but for the learning rates of some groups of modules.

    What transformers leaves without weight decay (norms, biases) stays so.

    Args:
        trainer: without an optimizer yet.
        model: the adapter's, as the trainer has it.
        rates: peak learning rate by group of `metier.models.groups`.
    """
    paths = {path: group for group in rates for path in group_paths(model, group)}
    wrappers = {id(module): path for path, module in whole_modules(model).items()}
    owner = {
        parameter: _group_of(wrappers[id(module)], paths)
        for module in model.modules()
        if isinstance(module, WholeModule)
        for parameter in getattr(module, COPIES).parameters()
    }
    decaying = set(trainer.get_decay_parameter_names(model))
    parts: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault((owner.get(parameter), name in decaying), []).append(parameter)
    # the experts' first: the rate that is logged is the first group's
    ordered = sorted(parts.items(), key=lambda part: (part[0][0] is not None, part[0][0] or "", not part[0][1]))
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": trainer.args.weight_decay if decays else 0.0,
            "lr": trainer.args.learning_rate if group is None else rates[group],
        }
        for (group, decays), parameters in ordered
    ]
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    trainer.optimizer = optimizer


def _group_of(path: str, groups: dict[str, str]) -> str | None:
    """Which group with a rate of its own a wrapped module is in; its path has PEFT's prefix."""
    return next((group for own, group in groups.items() if path == own or path.endswith(f".{own}")), None)
