"""Carry out the moves that `residency.py` decided: read a delta, place it, take it away; and keep the book right.

Whatever a move fails of, the book says afterwards where the delta really is, and no byte stays reserved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from metier.errors import DeltaError
from metier.serving.residency import Move, Residency
from metier.serving.served_delta import ServedDelta

Handle = TypeVar("Handle")


class DeltaStore(Protocol[Handle]):
    """The accelerator's side, which the engine has. Called in the loader's thread, while requests are running."""

    def place(self, delta: ServedDelta) -> Handle:
        """Copy a delta's values (`delta.copy_into`) to where they are served from, and return once they are there.

        No request uses them before the engine has the handle. Where this raises, nothing of it may stay.
        """

    def remove(self, handle: Handle) -> None:
        """Give a delta's room back. No request uses it any more."""

    def readying(self) -> Callable[[], None] | None:
        """A little work by which the next delta is placed sooner; None where there is none left.

        Both in a thread that stands back for all others.
        """


@dataclass(slots=True)
class Held(Generic[Handle]):
    """Where a delta's values are, the disk aside."""

    delta: ServedDelta
    loaded: ServedDelta | None = None
    """With its values on the host."""
    handle: Handle | None = None
    """Of its place on the accelerator."""


class Mover(Generic[Handle]):
    """Makes moves, one at a time, in the order in which they were decided.

    Args:
        store: where deltas are placed.
        residency: the book.
        lock: held for the book and for what is in `held`, and not while a move is being made.
        pins_host_memory: whether copies on the host lie in memory from which an accelerator copies by itself.
    """

    def __init__(
        self,
        store: DeltaStore[Handle],
        residency: Residency,
        lock: AbstractContextManager[bool],
        *,
        pins_host_memory: bool,
    ) -> None:
        self.held: dict[str, Held[Handle]] = {}
        self._store, self._residency, self._lock = store, residency, lock
        self._pins_host_memory = pins_host_memory

    def carry_out(self, moves: Sequence[Move]) -> DeltaError | None:
        """Make the moves; what has to make way does so even where a move up fails.

        Returns:
            why the last move could not be made; None where all were.
        """
        error: DeltaError | None = None
        for move in moves:
            if error is None or move.is_eviction:
                try:
                    self._make(move)
                except Exception as cause:
                    error = error or _as_delta_error(move, cause)
            with self._lock:
                # what could not be taken away is not used again either
                if error is None or move.is_eviction:
                    self._residency.done(move)
                else:
                    self._residency.abandon(move)
        return error

    def _make(self, move: Move) -> None:
        held = self.held[move.name]
        if move.source == "accelerator":
            handle, held.handle = held.handle, None
            assert handle is not None, f"{move}: it has no place there"
            self._store.remove(handle)
        elif move.is_eviction:
            held.loaded = None
        elif move.target == "host":
            held.loaded = held.delta.load(is_pinned=self._pins_host_memory)
        else:
            held.handle = self._store.place(held.loaded or held.delta)


def _as_delta_error(move: Move, cause: Exception) -> DeltaError:
    if isinstance(cause, DeltaError):
        return cause
    error = DeltaError(
        f"delta {move.name!r}: the move from {move.source} to {move.target} failed "
        f"({type(cause).__name__}: {cause!s:.200}).\nAsk again; if it fails again, take the delta out of service."
    )
    error.__cause__ = cause
    return error
