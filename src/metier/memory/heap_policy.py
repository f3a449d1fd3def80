"""When freed memory should go back to the system: no sooner than the process would grow past its peak without it."""

from __future__ import annotations


class HeapPolicy:
    """Asked at the same places of every step, such as between parts of layers.

    Giving back costs page faults later, so it pays only where the way to the next place, growing as much as it ever
    has, would lift the process above the most that it has held.
    """

    def __init__(self) -> None:
        self._growth: list[int] = []
        """On the way from each place of a step to the next, the most so far, in bytes.

        The last one leads to the first one of the next step.
        """
        self._next = self._last = 0
        self._held_bytes = self._peak_bytes = 0

    def begin_step(self) -> None:
        """What comes next is the first place again."""
        self._next = 0

    def should_give_back(self, held_bytes: int, peak_bytes: int) -> bool:
        """Whether to give back here, at the next place.

        Args:
            held_bytes: what the process holds.
            peak_bytes: the most that it has held.
        """
        if self._growth:
            # on the way it may have held more than at the end; that shows where it was a new peak
            reached = peak_bytes if peak_bytes > self._peak_bytes else held_bytes
            self._growth[self._last] = max(self._growth[self._last], reached - self._held_bytes)
        self._last, self._next = self._next, self._next + 1
        self._held_bytes, self._peak_bytes = held_bytes, peak_bytes
        if self._last == len(self._growth):
            self._growth.append(0)
            return True  # nobody knows yet what comes
        return held_bytes + self._growth[self._last] >= peak_bytes

    def gave_back(self, held_bytes: int) -> None:
        """Say what the process holds since then."""
        self._held_bytes = held_bytes
