"""A traced step as a row of segments, and what the whole of it takes when layers that were not traced are put in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from metier.planning.trace import Operations
from metier.planning.work import Work


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a step: one layer forward or backward, or what is between layers."""

    phase: str
    layer: int | None
    """None is what comes before the first layer, between two, or after the last one."""
    kept_bytes: int
    """How much more is held at its end than at its beginning; less than 0 where it frees what others kept."""
    peak_bytes: int
    """The most that was held beyond what was at its beginning."""
    fresh_bytes: int
    """Of what it makes, what no freed memory is used again for: large blocks, and what is more than before."""
    operations: Operations


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment of a step at which the most is held."""

    num_bytes: int
    kept_bytes: int
    """Of them, what there was when the part of the step began that has the peak; the rest is that part's own."""
    phase: str
    layer: int | None
    """The layer that the backward pass has come to, or the number of layers where it has come to none; those from the
    next one on have their gradients. None in the forward pass."""


@dataclass(frozen=True, slots=True)
class StepTrace:
    """The segments of a step in which one layer of each kind was traced."""

    segments: tuple[Segment, ...]
    stands_for: tuple[int, ...]
    """For each of the model's layers the one that was traced in its place."""
    num_forward_passes: int = 1
    """Where a step has several, all alike."""

    def repeated(self) -> Iterator[Segment]:
        """The segments of the whole step, in order."""
        for _ in range(self.num_forward_passes):
            yield from self._of("forward")
        yield from self._of("backward")

    @property
    def peak_bytes(self) -> int:
        """The most that is held beside what there was before the step: activations, gradients, temporaries."""
        return self.peak().num_bytes

    def peak(self) -> Peak:
        """When the most is held, and how much."""
        live, most, left = 0, Peak(0, 0, "forward", None), len(self.stands_for)
        # what one forward pass leaves is gone in the next
        for segment in (*self._of("forward"), *self._of("backward")):
            if segment.phase == "backward" and segment.layer is not None:
                left -= 1
            if live + segment.peak_bytes > most.num_bytes:
                is_backward = segment.phase == "backward"
                most = Peak(live + segment.peak_bytes, live, segment.phase, left if is_backward else None)
            live += segment.kept_bytes
        return most

    @property
    def kept_bytes(self) -> int:
        """What is left at the end: the gradients."""
        return sum(segment.kept_bytes for segment in self.repeated())

    def flops(self, phase: Literal["forward", "backward"]) -> int:
        """Of matrix products and attention, two for each multiplication and addition."""
        return sum(segment.operations.flops for segment in self.repeated() if segment.phase == phase)

    def bytes_moved(self, phase: Literal["forward", "backward"]) -> int:
        """Read and written by all operations, each tensor once an operation."""
        return sum(segment.operations.bytes_moved for segment in self.repeated() if segment.phase == phase)

    @property
    def fresh_bytes(self) -> int:
        """That a CPU's system has to find pages for."""
        return sum(segment.fresh_bytes for segment in self.repeated())

    def operations(self) -> Operations:
        """Of the whole step."""
        works: Counter[Work] = Counter()
        for segment in self.repeated():
            works.update(segment.operations.works)
        return Operations(works)

    def _of(self, phase: str) -> Iterator[Segment]:
        parts: list[list[Segment]] = [[]]
        for segment in self.segments:
            if segment.phase == phase:
                if segment.layer is not None:
                    parts.append([])
                parts[-1].append(segment)
        # what comes after a layer goes with it
        layers = {part[0].layer: part for part in parts[1:]}
        yield from parts[0]
        order = self.stands_for if phase == "forward" else reversed(self.stands_for)
        for layer in order:
            yield from layers.get(layer, ())  # none where a layer is not gone through backward
