"""Round float32 to bfloat16 up or down at random, so that the mean is exact and small updates are not lost.

Rounding to nearest drops every update below about 1/256 of a weight. Rounded with a chance equal to how near the value
is, the sum of many small updates arrives. The numbers come from a generator that the caller seeds by step and row, so
that a resumed run draws what an uninterrupted one draws.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16; values that bfloat16 holds, infinities and NaN stay as they are.

    Args:
        values: any shape, float32.
        generator: on the device of `values`.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    # the noise carries into bfloat16's last bit as often as the cut-off bits are large
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
