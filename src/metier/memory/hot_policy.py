"""Which blocks are worth keeping on the device across steps: those that were used most, lately. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

DECAY = 0.9
"""What a use counts for after each further step."""
MARGIN = 1.25
"""How much more a block must have been used than the one whose place it takes, so that two do not trade places."""


class HotPolicy:
    """Least-frequently-used with decay, over block numbers.

    Args:
        capacity: blocks that may be kept.
        uses: `uses` of the policy that this one goes on for.
    """

    def __init__(self, capacity: int, uses: Mapping[int, float] = MappingProxyType({})) -> None:
        self.capacity = capacity
        self._uses = dict(uses)

    @property
    def uses(self) -> dict[int, float]:
        """What the uses of each block so far count for."""
        return dict(self._uses)

    def used(self, block_ids: Iterable[int]) -> None:
        """A step used these blocks, each once; all earlier uses count for less."""
        self._uses = {block: uses * DECAY for block, uses in self._uses.items() if uses > 1e-3}
        for block in block_ids:
            self._uses[block] = self._uses.get(block, 0.0) + 1

    def changes(self, kept: Iterable[int]) -> tuple[list[int], list[int]]:
        """Blocks to give up and blocks to take instead, given those that are kept now."""
        kept = set(kept)
        wanted = sorted((b for b in self._uses if b not in kept), key=lambda b: (-self._uses[b], b))
        weakest = sorted(kept, key=lambda b: (self._uses.get(b, 0.0), b))
        num_free = self.capacity - len(kept)
        taken, given_up = wanted[: max(0, num_free)], weakest[: max(0, -num_free)]
        for new, old in zip(wanted[len(taken) :], weakest[len(given_up) :], strict=False):
            if self._uses[new] <= MARGIN * self._uses.get(old, 0.0):
                break
            taken.append(new)
            given_up.append(old)
        return given_up, taken
