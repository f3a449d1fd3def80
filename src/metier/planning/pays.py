"""On how many processes a run fits, with copies of the weights and with shards, and whether sharding pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
"""Numbers of processes that are looked at, beside the one that is planned for."""


@dataclass(frozen=True, slots=True)
class Pays:
    """Where a run fits, of the numbers that were looked at."""

    method: str
    fits_alone: bool
    looked_at: dict[str, tuple[int, ...]]
    """By way, numbers above 1 into which its batches can be parted."""
    fits: dict[str, tuple[int, ...]]
    """By way, those of them on which it fits."""
    least: tuple[int, int]
    """Of the sharded ones the number on which a process takes least, and how much."""
    here: tuple[Estimate, Estimate] | None
    """As planned, with copies and with shards, where both fit."""

    def __str__(self) -> str:
        if self.here is not None:
            return f"{self.method}: {_price(*self.here)}"
        copied, sharded = self._where(DDP), self._where(FSDP2)
        alone = "One process fits, for it has no buckets; in several, " if self.fits_alone and not copied else ""
        if copied:
            return f"{self.method}: DDP fits {copied}, FSDP2 {sharded or 'on none of them'}."
        if sharded:
            return f"{self.method}: {alone}DDP fits on no number of them; FSDP2 fits {sharded}."
        number, least = self.least
        return (
            f"{self.method}: {alone}it fits on no number up to {max(self.looked_at[FSDP2]):,}, sharded or not. Sharded "
            f"over {number:,}, where they take least, each takes {size(least)}."
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"fits_alone": self.fits_alone, "ddp": list(self.fits[DDP]), "fsdp2": list(self.fits[FSDP2])}

    def _where(self, way: str) -> str:
        """In words; "" for nowhere. More processes may take more, for what cannot be parted further is padded."""
        fits, larger = self.fits[way], self.looked_at[way]
        if not fits:
            return ""
        if fits == tuple(number for number in larger if number >= fits[0]):
            return f"from {fits[0]:,} on"
        return f"on {', '.join(f'{number:,}' for number in fits)}"


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
    looked_at = {way: _numbers(way, found) for way in (DDP, FSDP2)}
    if not looked_at[FSDP2]:
        return None
    fitting = [key for key, estimate in found.items() if budget_of(key[1]).fits(estimate)]
    fits = {way: _numbers(way, fitting) for way in (DDP, FSDP2)}
    here = None
    if world_size in fits[DDP] and world_size in fits[FSDP2]:
        here = (found[DDP, world_size], found[FSDP2, world_size])
    totals = {number: found[FSDP2, number].total_device_bytes for number in looked_at[FSDP2]}
    least = min(totals, key=lambda number: totals[number])
    return Pays(config.method, (DDP, 1) in fitting, looked_at, fits, (least, totals[least]), here)


def _numbers(way: str, keys: Sequence[tuple[str, int]] | dict[tuple[str, int], Estimate]) -> tuple[int, ...]:
    return tuple(number for other, number in keys if other == way and number > 1)


def _price(copied: Estimate, sharded: Estimate) -> str:
    """Of sharding, where it is not needed."""
    assert copied.on_rank is not None, "of one process of several"
    assert sharded.on_rank is not None, "of one process of several"
    more = sharded.on_rank.sent_bytes > copied.on_rank.sent_bytes
    saved = copied.total_device_bytes - sharded.total_device_bytes
    sent = [size(each.on_rank.sent_bytes) for each in (copied, sharded) if each.on_rank is not None]
    taken = f"{size(abs(saved))} {'less' if saved > 0 else 'more'} of each"
    said = f"both fit. DDP sends {sent[0]} a step from each, FSDP2 {sent[1]}, and FSDP2 takes {taken}"
    if more and saved > 0:
        return f"{said}: sharding pays only where that memory is needed."
    if not more and saved <= 0:
        return f"{said}: it saves sending alone."
    return f"{said}: sharding {'does not pay' if more else 'pays'}."
