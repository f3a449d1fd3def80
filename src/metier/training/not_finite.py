"""End a run at a gradient that is no number, before it is in the weights, where the next checkpoint would have it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from metier.errors import NotFiniteError
from metier.training.bare_optimizer import bare_optimizer


def stop_at_not_finite(trainer: Trainer) -> None:
    """Have the trainer look at each step's gradient norm before the optimizer does.

    torch's clipping makes every gradient NaN where one is, optimizers then every weight, and a log says nothing of it.
    An optimizer of rows in stores looks for itself, and says which they are.
    """
    plain = trainer._get_grad_norm

    def checked(model: nn.Module, grad_norm: Any = None) -> Any:
        norm = plain(model, grad_norm=grad_norm)
        looks_itself = getattr(bare_optimizer(trainer.optimizer), "updates_stores", False)
        if not looks_itself and not math.isfinite(_number(norm)):
            raise NotFiniteError(
                f"step {trainer.state.global_step + 1}: got gradients with values that are not finite; nothing was "
                "updated.\nWhat was trained before is good. Lower the learning rate, clip gradients, or "
                "compute in a wider dtype."
            )
        return norm

    trainer._get_grad_norm = checked


def _number(norm: Any) -> float:
    if isinstance(norm, torch.Tensor):
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(norm)
