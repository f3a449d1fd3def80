"""How many entries each parameter gets, from a share or a number, and which ones where only their number matters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def index_dtype(size: int) -> torch.dtype:
    """The smaller integer that holds every flat position in a parameter of `size` entries."""
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64


def shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` entries parted by the parameters' sizes, to the entry; the largest remainders get what is left.

    A parameter may get none, where there are fewer entries than would give it one.
    """
    total = sum(sizes.values())
    exact = {name: size * count / total for name, size in sizes.items()}
    parts = {name: min(int(share), sizes[name]) for name, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: parts[name] - exact[name])
    while (left := count - sum(parts.values())) > 0:
        open_ones = [name for name in by_remainder if parts[name] < sizes[name]][:left]
        for name in open_ones:
            parts[name] += 1
    return {name: part for name, part in parts.items() if part}


def evenly_spaced(size: int, count: int, *, device: torch.device | None = None) -> Tensor:
    """`count` different positions in `size`, as far apart as they can be; on the meta device only their number."""
    dtype = index_dtype(size)
    if device is not None and device.type == "meta":
        return torch.empty(count, dtype=dtype, device=device)
    return (torch.arange(count, dtype=torch.int64, device=device) * size // count).to(dtype)
