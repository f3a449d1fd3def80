"""Entries drawn evenly at random without replacement: the baseline that every other mask has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metier.methods.sparse_delta.masks.shares import index_dtype, shares


def random_entries(sizes: Mapping[str, int], count: int, *, seed: int) -> dict[str, Tensor]:
    """`count` entries over all parameters, each parameter with its share by size; the same for the same seed.

    The global draw differs from this only in how the shares scatter around their means.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _drawn(sizes[name], part, generator).to(index_dtype(sizes[name]))
        for name, part in shares(sizes, count).items()
    }


def _drawn(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Sorted positions; memory goes with `count`, except where more than half are drawn."""
    if count > size // 2:
        return torch.randperm(size, generator=generator)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        # some 5% more than are missing: doubles are drawn again
        more = torch.randint(size, (int(1.05 * (count - len(drawn))) + 8,), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    # `unique` sorts: a cut at the end would favour low positions
    kept = torch.randperm(len(drawn), generator=generator)[:count]
    return drawn[kept].sort().values
