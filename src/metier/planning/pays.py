"""From how many processes on a run fits, with copies of the weights and with shards, and whether sharding pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metier.config import RunConfig
from metier.distributed.parting import for_ranks
from metier.distributed.ranks import Ranks
from metier.errors import MetierError
from metier.planning.estimate import Estimate, Estimator
from metier.planning.fit import Budget
from metier.planning.sharding import DDP, FSDP2, RankEstimator
from metier.planning.spelling import size

SIZES = tuple(1 << power for power in range(11))
"""Numbers of processes that are looked at."""


@dataclass(frozen=True, slots=True)
class Pays:
    """Where a run fits, of `SIZES`."""

    method: str
    fits_alone: bool
    first: dict[str, int | None]
    """By way, the least number above 1 that fits."""
    least_bytes: int
    """Of one of the most processes, sharded."""
    here: tuple[Estimate, Estimate] | None
    """As planned, with copies and with shards, where both fit."""

    def __str__(self) -> str:
        copied, sharded = self.first[DDP], self.first[FSDP2]
        if copied is None and sharded is None:
            alone = "fits in one process, and " if self.fits_alone else "fits "
            return (
                f"{self.method}: {alone}on no number of them from 2 to {SIZES[-1]:,}, sharded or not: of {SIZES[-1]:,} "
                f"sharded ones each takes {size(self.least_bytes)}, most of which is not parted."
            )
        if copied is None:
            alone = "One process fits, for it has no buckets; " if self.fits_alone else ""
            return f"{self.method}: {alone}DDP fits on no number of them; FSDP2 fits from {sharded:,} on."
        if self.here is None:
            return f"{self.method}: DDP fits from {copied:,} on" + (
                "." if sharded is None else f", FSDP2 from {sharded:,}."
            )
        return f"{self.method}: {_price(*self.here)}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"fits_alone": self.fits_alone, "ddp_from": self.first[DDP], "fsdp2_from": self.first[FSDP2]}


def where_sharding_pays(
    config: RunConfig, estimator: Estimator, budget_of: Callable[[int], Budget], world_size: int
) -> Pays | None:
    """Where it fits; None where a step is not traced, or one of the ways is refused.

    Args:
        config: the run, as written.
        estimator: of one process.
        budget_of: what one of so many processes may take.
        world_size: that is planned for.
    """
    found: dict[tuple[str, int], Estimate] = {}
    for number in sorted({*SIZES, world_size}):
        for way in (DDP, FSDP2):
            try:
                parted = for_ranks(dataclasses.replace(config, fsdp=way == FSDP2), Ranks(size=number))
                estimate = RankEstimator(estimator, number)(parted)
            except MetierError:
                # a global batch that so many cannot part, or one process that is to shard
                continue
            if estimate.trace is None:
                return None
            found[way, number] = estimate
    sharded = [number for way, number in found if way == FSDP2]
    if not sharded:
        return None
    fitting = {key for key, estimate in found.items() if budget_of(key[1]).fits(estimate)}
    first = {way: min((n for w, n in fitting if w == way and n > 1), default=None) for way in (DDP, FSDP2)}
    both = {(DDP, world_size), (FSDP2, world_size)} <= fitting
    here = (found[DDP, world_size], found[FSDP2, world_size]) if both else None
    least = found[FSDP2, max(sharded)].total_device_bytes
    return Pays(config.method, (DDP, 1) in fitting, first, least, here)


def _price(copied: Estimate, sharded: Estimate) -> str:
    """Of sharding, where it is not needed."""
    assert copied.on_rank is not None, "of one process of several"
    assert sharded.on_rank is not None, "of one process of several"
    more, less = sharded.on_rank.sent_bytes, copied.on_rank.sent_bytes
    saved = copied.total_device_bytes - sharded.total_device_bytes
    said = f"both fit. DDP sends {size(less)} a step from each, FSDP2 {size(more)}"
    if saved <= 0:
        return f"{said} and takes {size(-saved)} more of each: sharding does not pay."
    return f"{said} for {size(saved)} less in each: sharding pays only where that memory is needed."
