"""The optimizer that a trainer has, whatever is around it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def bare_optimizer(optimizer: Any) -> Optimizer:
    """Without what accelerate wraps around it."""
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found
