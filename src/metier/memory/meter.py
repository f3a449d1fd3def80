"""Counts what a store of rows does in a step, for metrics and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Meter:
    """Counters of one store since they were last taken."""

    num_blocks: int
    num_blocks_used: int = 0
    """Blocks of the forward passes, each counted once a pass."""
    num_rows_updated: int = 0
    bytes_to_device: int = 0
    bytes_from_device: int = 0
    bytes_from_disk: int = 0
    bytes_to_disk: int = 0
    """Rows, moments and gradients for which there was no room in memory."""
    num_cache_hits: int = 0
    """Blocks that were asked for and lay on the device already, from this step or an earlier one."""
    num_fetched: int = 0
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

    def take(self) -> Meter:
        """What was counted; counting begins again."""
        taken = Meter(self.num_blocks)
        for name in self.__slots__:
            value, fresh = getattr(self, name), getattr(taken, name)
            setattr(taken, name, value)
            setattr(self, name, fresh)
        return taken


def of_a_step(meters: Sequence[Meter], num_steps: int) -> dict[str, float]:
    """What all stores of a model did, the mean of a step, for a log.

    The load of a Key-Expert is its tokens over the mean's; of all layers the largest is given, and the share of
    Key-Experts that no token had.
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
    asked = sum(meter.num_cache_hits + meter.num_fetched for meter in meters)
    loads = [meter.tokens_by_block for meter in meters]
    return {
        "rows_updated": sums["num_rows_updated"],
        "row_bytes_to_device": sums["bytes_to_device"],
        "row_bytes_from_device": sums["bytes_from_device"],
        "row_bytes_from_disk": sums["bytes_from_disk"],
        "row_bytes_to_disk": sums["bytes_to_disk"],
        "row_cache_hit_rate": sum(meter.num_cache_hits for meter in meters) / asked if asked else 0.0,
        "row_stall_seconds": sums["stall_seconds"],
        "key_expert_load_max": max((max(load) * len(load) / sum(load) for load in loads if sum(load)), default=0.0),
        "key_experts_unused": sum(load.count(0) for load in loads) / max(1, sum(len(load) for load in loads)),
    }
