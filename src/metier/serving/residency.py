"""Where deltas are (accelerator, host, disk), and which moves bring one up: least recently used ones make way.

Plain Python. It counts bytes and decides; `tiers.py` carries the moves out. What was decided is reserved at once and
changes nothing until it is `done`, so decisions that are still under way are never made twice, nor on the same bytes.

A delta is on the disk always, and on the host and the accelerator as copies: one that is on the accelerator keeps its
copy on the host as long as there is room, so that taking it off the accelerator moves nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from metier.errors import ServingError
from metier.serving.contract import Tier


@dataclass(frozen=True, slots=True)
class Move:
    """One step of a delta between two tiers. Upwards it makes a copy, downwards it drops the one in `source`."""

    name: str
    source: Tier
    target: Tier

    @property
    def is_eviction(self) -> bool:
        return self.target == "disk" or self.source == "accelerator"


@dataclass(slots=True)
class _Delta:
    num_bytes: dict[Tier, int]
    """Of a copy, by the tier that it is in."""
    is_pinned: bool
    num_users: int = 0
    copies: set[Tier] = field(default_factory=set)
    moves: list[Move] = field(default_factory=list)
    """Under way."""

    @property
    def is_busy(self) -> bool:
        return self.is_pinned or self.num_users > 0


class Residency:
    """The book of all deltas in service. Moves are carried out one at a time, in the order in which they were given.

    Args:
        accelerator_bytes: of deltas on the accelerator.
        host_bytes: of copies on the host; 0 where the accelerator is the host's memory.
    """

    def __init__(self, *, accelerator_bytes: int, host_bytes: int) -> None:
        self.budgets: dict[Tier, int] = {"accelerator": accelerator_bytes, "host": host_bytes}
        # the least recently used one first: who is used is put to the end
        self._deltas: dict[str, _Delta] = {}
        self._promised: dict[Tier, int] = {"accelerator": 0, "host": 0}

    def add(self, name: str, *, accelerator_bytes: int, host_bytes: int, is_pinned: bool = False) -> None:
        """A new delta, on the disk.

        Args:
            name: not one that is there.
            accelerator_bytes: what it takes on the accelerator.
            host_bytes: what it takes on the host.
            is_pinned: once on the accelerator, it stays there.

        Raises:
            ServingError: it, or with it pinned another one, could never be on the accelerator.
        """
        assert name not in self._deltas, f"{name} is there already"
        self._check_fits(name, accelerator_bytes, is_pinned=is_pinned)
        sizes: dict[Tier, int] = {"accelerator": accelerator_bytes, "host": host_bytes}
        self._deltas[name] = _Delta(num_bytes=sizes, is_pinned=is_pinned)

    def pin(self, name: str, is_pinned: bool = True) -> None:
        """Whether a delta stays on the accelerator once it is there.

        Raises:
            ServingError: as `add`.
        """
        delta = self._deltas[name]
        if is_pinned and not delta.is_pinned:
            self._check_fits(name, delta.num_bytes["accelerator"], is_pinned=True)
        delta.is_pinned = is_pinned

    def touch(self, name: str) -> None:
        """Somebody asked for a delta."""
        self._deltas[name] = self._deltas.pop(name)

    def acquire(self, name: str) -> None:
        """A request begins to use a delta that is resident."""
        assert self.is_resident(name), f"{name} is not on the accelerator"
        self._deltas[name].num_users += 1
        self.touch(name)

    def release(self, name: str) -> None:
        """A request that used a delta is over."""
        assert self._deltas[name].num_users > 0, f"nobody uses {name}"
        self._deltas[name].num_users -= 1
        self.touch(name)

    def is_resident(self, name: str) -> bool:
        """Whether a request may begin to use it now: on the accelerator, and not on its way down."""
        delta = self._deltas[name]
        return "accelerator" in delta.copies and all(move.source != "accelerator" for move in delta.moves)

    def resident_names(self) -> frozenset[str]:
        return frozenset(name for name in self._deltas if self.is_resident(name))

    def is_pinned(self, name: str) -> bool:
        return self._deltas[name].is_pinned

    def num_users(self, name: str) -> int:
        return self._deltas[name].num_users

    def tier(self, name: str) -> Tier:
        """The highest one in which a delta has a copy."""
        copies = self._deltas[name].copies
        return "accelerator" if "accelerator" in copies else "host" if "host" in copies else "disk"

    def num_bytes(self, tier: Tier) -> int:
        """Of the copies that are in a tier now; of the disk, of the deltas that have none elsewhere."""
        if tier == "disk":
            return sum(x.num_bytes["host"] for x in self._deltas.values() if not x.copies)
        return sum(x.num_bytes[tier] for x in self._deltas.values() if tier in x.copies)

    def make_room(self, name: str, *, keeping: Collection[str] = ()) -> tuple[Move, ...] | None:
        """The moves that make a delta resident: who has to make way for it, then its own way up.

        Args:
            name: of the delta.
            keeping: names of others that are not to make way.

        Returns:
            nothing to do where it is resident or on its way up; None where it cannot be now, since those that would
            have to make way are in use, are kept or are moving.
        """
        delta = self._deltas[name]
        if any(not move.is_eviction for move in delta.moves) or self.is_resident(name):
            return ()
        if delta.moves:
            return None
        from_accelerator = self._victims("accelerator", delta, keeping)
        if from_accelerator is None:
            return None
        start: Tier = "host" if "host" in delta.copies else "disk"
        # where the host has no room for it, it is read straight to the accelerator
        from_host = None if start == "host" else self._victims("host", delta, keeping)
        moves = [Move(victim, "host", "disk") for victim in from_host or ()]
        for victim in from_accelerator:
            keeps_copy = "host" in self._deltas[victim].copies and victim not in (from_host or ())
            moves.append(Move(victim, "accelerator", "host" if keeps_copy else "disk"))
        if from_host is not None:
            moves.append(Move(name, "disk", "host"))
            start = "host"
        return self._begun([*moves, Move(name, start, "accelerator")])

    def prefetch(self, names: Collection[str]) -> tuple[Move, ...]:
        """The moves to begin now for deltas that are waited for, of the first of them for which there are any.

        None makes way that an earlier name stands for, and one that a later name stands for only where no others can.
        Where the accelerator has no room now, a delta is brought to the host.

        Args:
            names: who has waited longest comes first.
        """
        names = dict.fromkeys(names)
        earlier: set[str] = set()
        for name in names:
            moves = self.make_room(name, keeping=names)
            if moves is None:
                moves = self.make_room(name, keeping=earlier)
            if moves is None:
                moves = self._to_host(name, earlier)
            if moves:
                return moves
            earlier.add(name)
        return ()

    def drop(self, name: str) -> tuple[Move, ...]:
        """The moves after which a delta that nobody uses has no copy, so that it can be forgotten."""
        delta = self._deltas[name]
        assert delta.num_users == 0, f"{name} is in use"
        assert not delta.moves, f"{name} is moving"
        return self._begun([Move(name, tier, "disk") for tier in sorted(delta.copies)])

    def send_down(self, name: str) -> tuple[Move, ...]:
        """The move that takes a delta off the accelerator; none where it is not there, in use, pinned or moving."""
        delta = self._deltas[name]
        if delta.is_busy or delta.moves or "accelerator" not in delta.copies:
            return ()
        return self._begun([Move(name, "accelerator", "host" if "host" in delta.copies else "disk")])

    def forget(self, name: str) -> None:
        """A delta that has no copy is not in service any more."""
        delta = self._deltas.pop(name)
        assert not delta.copies, f"{name} has copies still"
        assert not delta.moves, f"{name} is moving"

    def done(self, move: Move) -> None:
        """A move has been carried out."""
        delta = self._deltas[move.name]
        delta.moves.remove(move)
        if move.is_eviction:
            delta.copies.discard(move.source)
        else:
            delta.copies.add(move.target)

    def abandon(self, move: Move) -> None:
        """A move upwards failed or will not be made; its bytes are free again. Others have made way for nothing."""
        assert not move.is_eviction, f"{move}: others may have been promised its bytes"
        delta = self._deltas[move.name]
        delta.moves.remove(move)
        self._promised[move.target] -= delta.num_bytes[move.target]

    def _begun(self, moves: list[Move]) -> tuple[Move, ...]:
        """Reserve what the moves take, and count on what they free: it is free by the time a later move is made."""
        for move in moves:
            delta = self._deltas[move.name]
            delta.moves.append(move)
            if move.is_eviction:
                self._promised[move.source] -= delta.num_bytes[move.source]
            else:
                self._promised[move.target] += delta.num_bytes[move.target]
        return tuple(moves)

    def _to_host(self, name: str, keeping: Collection[str]) -> tuple[Move, ...] | None:
        delta = self._deltas[name]
        if delta.copies:
            return None
        victims = self._victims("host", delta, keeping)
        if victims is None:
            return None
        return self._begun([*(Move(victim, "host", "disk") for victim in victims), Move(name, "disk", "host")])

    def _victims(self, tier: Tier, wanted: _Delta, keeping: Collection[str]) -> list[str] | None:
        """The least recently used deltas whose copies in a tier have to make way; None where that is not enough."""
        missing = self._promised[tier] + wanted.num_bytes[tier] - self.budgets[tier]
        victims = []
        for name, delta in self._deltas.items():
            if missing <= 0:
                break
            if self._may_evict(name, delta, tier, keeping):
                victims.append(name)
                missing -= delta.num_bytes[tier]
        return victims if missing <= 0 else None

    def _may_evict(self, name: str, delta: _Delta, tier: Tier, keeping: Collection[str]) -> bool:
        if tier not in delta.copies or delta.moves:
            return False
        # a copy under one on the accelerator is nobody's only one
        is_spare = tier == "host" and "accelerator" in delta.copies
        return is_spare or not (delta.is_busy or name in keeping)

    def _check_fits(self, name: str, num_bytes: int, *, is_pinned: bool) -> None:
        """Raise unless every delta could be on the accelerator beside all pinned ones."""
        others = [x for other, x in self._deltas.items() if other != name]
        pinned = sum(x.num_bytes["accelerator"] for x in others if x.is_pinned)
        largest = max((x.num_bytes["accelerator"] for x in others if not x.is_pinned), default=0) if is_pinned else 0
        budget = self.budgets["accelerator"]
        if num_bytes + pinned + largest <= budget:
            return
        beside = f", and the largest that is not needs {largest:,}" if largest else ""
        raise ServingError(
            f"delta {name!r}: got {num_bytes:,} bytes{' to pin' if is_pinned else ''}, where the accelerator has "
            f"{budget:,} for deltas, of which {pinned:,} are pinned already{beside}.\n"
            "Raise the budget for deltas, or pin fewer."
        )
