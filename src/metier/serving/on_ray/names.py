"""Which delta is served under which name, by all replicas: decided in one place.

A replica need not hear of a change when it is made, since each request carries its delta along: one that started since
then puts it into service with the first request for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from metier.errors import DeltaError, UnknownDeltaError


@dataclass(frozen=True, slots=True)
class NamedDelta:
    name: str
    folder: Path
    """Where every replica finds it."""
    since_ns: int
    """When it was put into service, since 1970: the later of two that had one name after the other has more."""


class Names:
    """The deltas that are served. It belongs to one event loop."""

    def __init__(self, deltas: Iterable[NamedDelta]) -> None:
        self._deltas = {delta.name: delta for delta in deltas}
        self._coming: set[str] = set()
        self._leaving: set[str] = set()

    def all(self) -> list[NamedDelta]:
        """In the order in which they came."""
        return list(self._deltas.values())

    def get(self, name: str) -> NamedDelta | None:
        return self._deltas.get(name)

    @contextmanager
    def coming(self, name: str, folder: Path) -> Iterator[NamedDelta]:
        """A delta that is served once the block is over, and is not where it raises. Meanwhile the name is taken.

        Raises:
            DeltaError: the name is taken.
        """
        if name in self._leaving:
            raise DeltaError(
                f"delta {name!r}: one of that name is still going out of service.\nWait until its requests are over."
            )
        if name in self._deltas or name in self._coming:
            raise DeltaError(f"delta {name!r}: the name is taken.\nTake that one out of service first.")
        self._coming.add(name)
        try:
            delta = NamedDelta(name, folder, time.time_ns())
            yield delta
            self._deltas[name] = delta
        finally:
            self._coming.remove(name)

    def restore(self, delta: NamedDelta) -> None:
        """One that is leaving stays."""
        self._deltas[delta.name] = delta

    @contextmanager
    def leaving(self, name: str) -> Iterator[NamedDelta]:
        """A delta that is not served from now on; its name is free once the block is over.

        Raises:
            UnknownDeltaError: no delta of that name is served.
        """
        delta = self._deltas.pop(name, None)
        if delta is None:
            raise UnknownDeltaError(
                f"delta {name!r}: no delta of that name is served.\nName one that is, or put it into service first."
            )
        self._leaving.add(name)
        try:
            yield delta
        finally:
            self._leaving.remove(name)
