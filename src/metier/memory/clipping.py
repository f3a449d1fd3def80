"""Clipping by the global norm where some gradients are those of rows, which may lie on disk.

torch's own reads every gradient at once and writes all of them again. Here those of rows are read some at a time, as
the disk is told beforehand, and what lies there is not written: the optimizer multiplies as it reads. A norm that is
finite says that all gradients are, so that the optimizer need not look again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from metier.memory.step_gradients import step_gradients_of

_NEXT_TO_NOTHING = 1e-6
"""Added to a norm that is divided by, as torch has it."""


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their 2-norm, as one vector, is at most `max_norm`.

    Args:
        parameters: those of rows among them; as `torch.nn.utils.clip_grad_norm_` otherwise.
        max_norm: inf to know the norm and change nothing.

    Returns:
        the norm before, float32 on the CPU.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    of_rows = [found for p in with_gradient if (found := step_gradients_of(p)) is not None]
    ordinary = [p.grad for p in with_gradient if p.grad is not None and step_gradients_of(p) is None]
    norms = [float(torch.nn.utils.get_total_norm(ordinary))] if ordinary else []
    norm = math.hypot(*norms, *(gradients.norm() for gradients in of_rows))
    scale = max_norm / (norm + _NEXT_TO_NOTHING)
    if scale < 1:
        for grad in ordinary:
            grad.mul_(scale)
        for gradients in of_rows:
            gradients.multiply(scale)
    return torch.tensor(norm)
