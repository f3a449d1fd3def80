"""Gates that are learned: numbers in [0, 1] that are exactly 0 or 1 with a chance that has a gradient.

    u ~ U(0, 1);  s = sigmoid(log u - log(1 - u) + α);  z = min(1, max(0, s (upper - lower) + lower))

with lower < 0 and upper > 1. Louizos et al., arXiv:1712.01312; used by diff pruning, arXiv:2012.07463, whose code has
the temperature 1 and the bounds -1.5 and 1.5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EDGE = 1e-6
"""Distance of u from 0 and 1, where its logit is infinite."""


def sampled_gates(alpha: Tensor, *, lower: float, upper: float) -> Tensor:
    """Gates drawn anew, in α's shape; differentiable in α wherever a gate is not at 0 or 1."""
    u = torch.rand_like(alpha).clamp_(_EDGE, 1 - _EDGE)
    return _stretched(torch.sigmoid(u.log() - (1 - u).log() + alpha), lower, upper)


def fixed_gates(alpha: Tensor, *, lower: float, upper: float) -> Tensor:
    """What gates are without the draw (u = 1/2): for evaluation, and for what is left behind."""
    return _stretched(torch.sigmoid(alpha), lower, upper)


def open_chance(alpha: Tensor, *, lower: float, upper: float) -> Tensor:
    """The chance that a gate is not 0, P(z > 0) = sigmoid(α - log(-lower / upper)); its sum is the expected L0 norm."""
    return torch.sigmoid(alpha - math.log(-lower / upper))


def _stretched(s: Tensor, lower: float, upper: float) -> Tensor:
    return (s * (upper - lower) + lower).clamp(0, 1)
