"""Scores by the weights themselves, for which no data is needed.

The smallest magnitudes are PaFi's (arXiv:2305.16742); the largest are the obvious other end, to compare with.
"""

from __future__ import annotations

from torch import Tensor


def magnitude(parameter: Tensor) -> Tensor:
    """|w|, float32, in the parameter's shape."""
    return parameter.detach().float().abs()
