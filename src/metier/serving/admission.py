"""Which waiting request starts next: first come, first served, but deltas take turns and none is kept waiting for ever.

Plain Python, data in and decisions out. The requests of one delta start in the order in which they came. Between deltas
it goes round: one start each, so that a flood of requests for one delta is the business of that delta alone. Requests
whose delta is not on the accelerator yet are passed by others, but not for ever: whoever has been first in its delta's
line for `max_passes` starts of others is due, and then nobody behind it starts before it. Running requests end
meanwhile, so that its delta finds room. The base counts as a delta that is always there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from metier.errors import OverloadedError


@dataclass(slots=True)
class _Line:
    """The requests of one delta that wait, in the order in which they came."""

    requests: dict[str, None] = field(default_factory=dict)
    """As a dictionary, from which any can be taken out at once."""
    first_since: int = 0
    """How many requests had been started when its first one became first."""


class Admission:
    """The requests that wait for a place in the batch.

    Args:
        max_waiting: most requests that wait. A delta may take no more places than it leaves free, so that a flood of
            requests for one is refused while those for another are still taken.
        max_passes: most requests of other deltas that start while one is first in its delta's line; beyond them those
            alone whose turn comes before.
    """

    def __init__(self, *, max_waiting: int, max_passes: int = 64) -> None:
        self.max_waiting = max_waiting
        self.max_passes = max_passes
        # whose turn is next comes first, so whoever is due has come to the front; only deltas that are waited for
        self._lines: dict[str | None, _Line] = {}
        self._delta_of: dict[str, str | None] = {}
        self._num_started = 0

    @property
    def num_waiting(self) -> int:
        return len(self._delta_of)

    def add(self, request_id: str, delta: str | None) -> None:
        """A request that came just now.

        Args:
            request_id: not one that waits already.
            delta: its name; None for the base.

        Raises:
            OverloadedError: too many wait already.
        """
        assert request_id not in self._delta_of, f"{request_id} waits already"
        line = self._lines.get(delta, _Line(first_since=self._num_started))
        num_own, num_free = len(line.requests), self.max_waiting - self.num_waiting
        if num_own >= num_free:
            whose = "the base" if delta is None else f"{delta!r}"
            raise OverloadedError(
                f"{self.num_waiting} requests wait already, {num_own} of them for {whose}, where {self.max_waiting} "
                "may wait, and for one model no more than it leaves free.\nTry again later."
            )
        line.requests[request_id] = None
        self._lines[delta] = line
        self._delta_of[request_id] = delta

    def cancel(self, request_id: str) -> bool:
        """Take a request out; False where it does not wait."""
        if request_id not in self._delta_of:
            return False
        self._take(request_id)
        return True

    def cancel_delta(self, delta: str) -> list[str]:
        """Take all requests for a delta out, which are returned: it cannot be loaded, or goes out of service."""
        line = self._lines.pop(delta, _Line())
        for request_id in line.requests:
            del self._delta_of[request_id]
        return list(line.requests)

    def next(self, num_free_slots: int, resident_names: Collection[str]) -> list[str]:
        """The requests to start now, which wait no more.

        Args:
            num_free_slots: how many the batch has room for.
            resident_names: deltas that a request may begin to use at once.
        """
        started: list[str] = []
        while len(started) < num_free_slots:
            delta, line = self._next_line(resident_names)
            if line is None:
                break
            request_id = next(iter(line.requests))
            self._num_started += 1
            self._take(request_id)
            if delta in self._lines:  # to the end, where its next turn is
                self._lines[delta] = self._lines.pop(delta)
            started.append(request_id)
        return started

    def waiting_deltas(self) -> list[str]:
        """Names of the deltas that requests wait for, in the order of their turns."""
        return [delta for delta in self._lines if delta is not None]

    def _next_line(self, resident_names: Collection[str]) -> tuple[str | None, _Line | None]:
        for delta, line in self._lines.items():
            if delta is None or delta in resident_names:
                return delta, line
            if self._num_started - line.first_since >= self.max_passes:
                break  # it is due: nobody behind it starts
        return None, None

    def _take(self, request_id: str) -> None:
        delta = self._delta_of.pop(request_id)
        line = self._lines[delta]
        was_first = next(iter(line.requests)) == request_id
        del line.requests[request_id]
        if not line.requests:
            del self._lines[delta]
        elif was_first:
            line.first_since = self._num_started
