"""Moves are made in their order, and whatever fails of them, the book says where deltas are. Deltas are only names."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from metier.errors import CorruptDeltaError, DeltaError
from metier.serving.moving import Held, Mover
from metier.serving.residency import Residency


@dataclass
class Named:
    """In place of a delta."""

    name: str
    where: str = "disk"

    def load(self, *, is_pinned: bool) -> Named:
        return Named(self.name, "pinned host" if is_pinned else "host")


@dataclass
class Store:
    log: list[str] = field(default_factory=list)
    fails: dict[str, Exception] = field(default_factory=dict)
    """By what would be written to the log."""

    def _do(self, what: str) -> None:
        self.log.append(what)
        if what in self.fails:
            raise self.fails[what]

    def place(self, delta: Any) -> str:
        self._do(f"place {delta.name} from {delta.where}")
        return f"place of {delta.name}"

    def remove(self, handle: str) -> None:
        self._do(f"remove {handle}")


class Made:
    def __init__(self, *, accelerator: int, host: int = 0, pins: bool = False, **sizes: int) -> None:
        self.store, self.residency = Store(), Residency(accelerator_bytes=accelerator, host_bytes=host)
        self.mover: Mover[str] = Mover(self.store, self.residency, threading.RLock(), pins_host_memory=pins)
        for name, size in sizes.items():
            self.residency.add(name, accelerator_bytes=size, host_bytes=size)
            self.mover.held[name] = Held(Named(name))  # type: ignore[arg-type]

    def bring_up(self, name: str) -> DeltaError | None:
        moves = self.residency.make_room(name)
        assert moves
        return self.mover.carry_out(moves)

    def tiers(self) -> dict[str, str]:
        return {name: self.residency.tier(name) for name in self.mover.held}


@pytest.mark.parametrize(("pins", "where"), [(False, "host"), (True, "pinned host")])
def test_a_delta_is_placed_from_its_copy_on_the_host(pins: bool, where: str) -> None:
    made = Made(accelerator=1, host=1, pins=pins, a=1)
    assert made.bring_up("a") is None
    assert made.store.log == [f"place a from {where}"]
    assert made.tiers() == {"a": "accelerator"}


def test_who_has_to_make_way_does_so_first() -> None:
    made = Made(accelerator=2, a=1, b=1, large=2)
    made.bring_up("a")
    made.bring_up("b")
    assert made.bring_up("large") is None
    assert made.store.log[2:] == ["remove place of a", "remove place of b", "place large from disk"]
    assert made.tiers() == {"a": "disk", "b": "disk", "large": "accelerator"}


def test_where_one_cannot_be_removed_the_others_are_and_nothing_is_placed() -> None:
    made = Made(accelerator=2, a=1, b=1, large=2)
    made.bring_up("a")
    made.bring_up("b")
    made.store.fails = {f"remove place of {name}": RuntimeError(f"{name} is stuck") for name in "ab"}
    error = made.bring_up("large")
    assert "delta 'a': the move from accelerator to disk failed (RuntimeError: a is stuck)" in str(error)
    assert made.store.log[2:] == ["remove place of a", "remove place of b"]
    assert made.tiers() == {"a": "disk", "b": "disk", "large": "disk"}
    assert made.bring_up("large") is None


def test_a_delta_that_cannot_be_placed_stays_on_the_host() -> None:
    made = Made(accelerator=1, host=1, a=1)
    made.store.fails["place a from host"] = MemoryError()
    error = made.bring_up("a")
    assert str(error).startswith("delta 'a': the move from host to accelerator failed (MemoryError: ).\nAsk again")
    assert made.tiers() == {"a": "host"}
    made.store.fails.clear()
    assert made.bring_up("a") is None


def test_errors_about_deltas_are_told_as_they_are() -> None:
    made = Made(accelerator=1, a=1)
    made.store.fails["place a from disk"] = want = CorruptDeltaError("altered")
    assert made.bring_up("a") is want
    assert made.residency.num_bytes("accelerator") == 0
