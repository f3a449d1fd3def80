"""Which delta may answer under which name at any moment of the soak, while clients load and unload.

A name that one client at a time changes is known at each moment: a delta's folder, nothing, or, while a change is under
way, either. A request may be answered by any that was possible between its beginning and its end, and by no other. A
name that all change at once has one folder, so that its answers are known too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from serving_soak_world import BASE, PERMANENT, SHELF

ABSENT = "(not served)"
"""In place of a folder: the name is not served."""


class Name:
    def __init__(self, name: str, folders: list[str | None], possible: set[str | None]) -> None:
        """Args:
        folders: that it may be loaded from; None for the base.
        possible: what may answer under it now.
        """
        self.name, self.folders = name, folders
        self.lock = asyncio.Lock()
        """Held by who changes it."""
        self._possible = frozenset(possible)
        self._watching: list[set[str | None]] = []

    @property
    def possible(self) -> frozenset[str | None]:
        return self._possible

    def may_be(self, *possible: str | None) -> None:
        """From now on."""
        self._possible = frozenset(possible)
        for seen in self._watching:
            seen.update(possible)

    @contextmanager
    def watched(self) -> Iterator[set[str | None]]:
        """All that was possible from the beginning of the block on."""
        seen = set(self._possible)
        self._watching.append(seen)
        try:
            yield seen
        finally:
            # by identity: two sets may be equal
            self._watching = [each for each in self._watching if each is not seen]


class Names:
    def __init__(self) -> None:
        self.fixed = [Name(BASE, [None], {None}), *(Name(each, [each], {each}) for each in PERMANENT)]
        """Nobody changes them."""
        self.orderly = [Name(each, [each], {each}) for each in SHELF]
        self.orderly += [Name("swapped", ["esft-3", "thin-2", "lora-2"], {ABSENT})]
        self.orderly += [Name("swapped-too", ["esft-4", "esft-3"], {ABSENT})]
        """Changed by one client at a time."""
        self.contested = [
            Name(f"contested-{each}", [each], {each, ABSENT}) for each in ("esft-4", "thin-2", "lora-2", "esft-3")
        ]
        """Changed by anybody at any time."""
        self.all = [*self.fixed, *self.orderly, *self.contested]
        self.asked = [*self.fixed * 3, *self.orderly * 2, *self.contested]
        """As often as they are asked."""
