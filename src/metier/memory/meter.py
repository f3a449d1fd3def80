"""Counts what a store of rows does in a step, for metrics and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import add


@dataclass(slots=True)
class Meter:
    """Counters of one store since they were last taken."""

    num_blocks: int
    block_bytes: int = 0
    """Of a block's rows."""
    num_blocks_used: int = 0
    """Blocks of the backward passes, each counted once a pass."""
    num_rows_updated: int = 0
    bytes_to_device: int = 0
    bytes_from_device: int = 0
    bytes_from_disk: int = 0
    bytes_to_disk: int = 0
    """Rows, moments and gradients for which there was no room in memory."""
    num_asked: int = 0
    """Blocks whose rows a step asked for where they are not always at hand, each counted once a step."""
    num_moved: int = 0
    """Of them, those whose rows had to be moved for it; the others were there already."""
    num_fetched: int = 0
    """Blocks whose rows were copied to a device, each time that they were."""
    stall_seconds: float = 0.0
    """Time that a pass waited for rows."""
    tokens_by_block: list[int] = field(default_factory=list)
    """How many tokens each block served."""

    def __post_init__(self) -> None:
        self.tokens_by_block = [0] * self.num_blocks

    def used(self, block_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        self.num_blocks_used += len(block_ids)
        for block, count in zip(block_ids, num_tokens, strict=True):
            self.tokens_by_block[block] += count

    def add(self, other: Meter) -> None:
        """Count what another of the same store has counted, too."""
        for name in _COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.tokens_by_block = list(map(add, self.tokens_by_block, other.tokens_by_block))

    def take(self) -> Meter:
        """What was counted; counting begins again."""
        taken = Meter(self.num_blocks, self.block_bytes)
        for name in self.__slots__:
            value, fresh = getattr(self, name), getattr(taken, name)
            setattr(taken, name, value)
            setattr(self, name, fresh)
        return taken


_COUNTERS = tuple(one.name for one in fields(Meter) if one.name not in ("num_blocks", "block_bytes", "tokens_by_block"))


def of_a_step(meters: Sequence[Meter], num_steps: int) -> dict[str, float]:
    """What all stores of a model did, the mean of a step, for a log.

    The load of a Key-Expert is its tokens over the mean's; of all layers the largest is given, and the share of
    Key-Experts that no token had. The rate of hits is the share of blocks whose rows were not moved for the step; it is
    left out where nothing ever has to move.
    """
    sums = {
        name: sum(getattr(meter, name) for meter in meters) / num_steps
        for name in (
            "num_rows_updated",
            "bytes_to_device",
            "bytes_from_device",
            "bytes_from_disk",
            "bytes_to_disk",
            "stall_seconds",
        )
    }
    touched = sum(meter.num_blocks_used * meter.block_bytes for meter in meters) / num_steps
    num_asked, num_moved = (sum(getattr(meter, name) for meter in meters) for name in ("num_asked", "num_moved"))
    hits = {"row_cache_hit_rate": 1 - num_moved / num_asked} if num_asked else {}
    tokens = [meter.tokens_by_block for meter in meters]
    return {
        "rows_updated": sums["num_rows_updated"],
        "row_bytes_touched": touched,
        "row_bytes_to_device": sums["bytes_to_device"],
        "row_bytes_from_device": sums["bytes_from_device"],
        "row_bytes_from_disk": sums["bytes_from_disk"],
        "row_bytes_to_disk": sums["bytes_to_disk"],
        **hits,
        "row_stall_seconds": sums["stall_seconds"],
        "key_expert_load_max": max((max(one) * len(one) / sum(one) for one in tokens if sum(one)), default=0.0),
        "key_experts_unused": sum(one.count(0) for one in tokens) / max(1, sum(len(one) for one in tokens)),
    }
