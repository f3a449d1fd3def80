"""The deltas of one replica: put into service when a request brings them along, and resident as Ray Serve decides.

Ray Serve's model multiplexing keeps a book of the deltas that a replica holds, by which requests are routed, and says
which of them has to go when another one comes. A replica starts with none on its accelerator; what is in Ray's book is
brought up, and what falls out of it is sent down. The tiers' own order of making way is left with what Ray cannot know:
that one which has to go is still in use.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Protocol

from metier.errors import MetierError, UnknownDeltaError
from metier.serving.contract import DeltaService, DeltaStatus
from metier.serving.http.metrics import Metrics
from metier.serving.on_ray.names import NamedDelta


class PlacingEngine(DeltaService, Protocol):
    async def bring_delta(self, name: str) -> None:
        """As `Engine.bring_delta`."""

    def send_delta_down(self, name: str) -> None:
        """As `Engine.send_delta_down`; from any thread."""


Multiplexed = Callable[[str], Awaitable[object]]
Multiplex = Callable[[Multiplexed, int], Multiplexed]
"""`serve.multiplexed`: what loads a model by its id, and how many a replica holds."""


def num_that_fit(sizes: Iterable[int], budget_bytes: int) -> int:
    """How many deltas a budget holds, whichever they are; at least 1."""
    num, total = 0, 0
    for size in sorted(sizes, reverse=True):
        total += size
        if total > budget_bytes:
            break
        num += 1
    return max(1, num)


class Placement:
    """Belongs to the event loop of its replica."""

    def __init__(
        self,
        engine: PlacingEngine,
        metrics: Metrics,
        multiplex: Multiplex,
        *,
        budget_bytes: int,
        deltas: Iterable[NamedDelta],
    ) -> None:
        """Args:
        engine: in which `deltas` are in service.
        metrics: that count where a delta lay when a request for it came.
        multiplex: Ray Serve's.
        budget_bytes: of deltas on the accelerator.
        """
        self._engine, self._metrics, self._multiplex = engine, metrics, multiplex
        self._budget_bytes = budget_bytes
        self._named = {delta.name: delta for delta in deltas}
        self._forgotten: dict[str, int] = {}
        """Since when a delta was in service that is not any more; the last of each name."""
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[object]] = set()
        self._load: Multiplexed | None = None
        for status in engine.deltas():
            engine.send_delta_down(status.name)

    def capacity(self) -> int:
        """How many of the deltas in service can be on the accelerator at once, whichever they are."""
        return num_that_fit([status.num_bytes for status in self._engine.deltas()], self._budget_bytes)

    async def make_ready(self, delta: NamedDelta) -> None:
        """Have a delta in service and on the accelerator, for a request that is about to begin.

        Raises:
            UnknownDeltaError: it went out of service while the request was on its way.
            MetierError: as `Engine.load_delta` and `Engine.bring_delta`.
        """
        tier = (await self.put(delta)).tier
        self._metrics.count_arrival(delta.name, tier)
        if self._load is None:
            self._load = self._multiplex(self._bring, self.capacity())
        # of its own, so that a client that leaves does not end what others wait for, nor Ray's book become wrong
        await self._to_its_end(self._load(delta.name))

    async def put(self, delta: NamedDelta) -> DeltaStatus:
        """Have a delta in service; another one that had its name before is taken out first.

        Raises:
            UnknownDeltaError: it is one that was forgotten.
            MetierError: as `Engine.load_delta`.
        """
        self._check_not_forgotten(delta)
        if self._named.get(delta.name) != delta:
            # of its own: the engine's load goes on when a client leaves, and has to be put down
            await self._to_its_end(self._put(delta))
        return next(status for status in self._engine.deltas() if status.name == delta.name)

    async def _to_its_end(self, change: Awaitable[object]) -> None:
        """Whether or not the client waits for it."""
        task = asyncio.ensure_future(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _put(self, delta: NamedDelta) -> None:
        async with self._lock(delta.name):
            self._check_not_forgotten(delta)
            former = self._named.get(delta.name)
            if former is not None and former != delta:
                if former.since_ns > delta.since_ns:
                    raise UnknownDeltaError(f"delta {delta.name!r}: a newer one has taken its name.")
                await self._unload(former)
            if former != delta:
                await self._engine.load_delta(delta.name, delta.folder)
                self._named[delta.name] = delta

    async def forget(self, delta: NamedDelta) -> None:
        """Take a delta out of service, once its running requests are over."""
        self._forgotten[delta.name] = max(delta.since_ns, self._forgotten.get(delta.name, 0))
        async with self._lock(delta.name):
            if self._named.get(delta.name) == delta:
                await self._unload(delta)

    def _check_not_forgotten(self, delta: NamedDelta) -> None:
        if delta.since_ns <= self._forgotten.get(delta.name, 0):
            raise UnknownDeltaError(f"delta {delta.name!r}: it has just been taken out of service.")

    async def _unload(self, delta: NamedDelta) -> None:
        del self._named[delta.name]
        await self._engine.unload_delta(delta.name)

    async def _bring(self, name: str) -> _Held:
        await self._engine.bring_delta(name)
        return _Held(self._engine, name)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


class _Held:
    """In Ray's book: a delta that is held here. Ray calls `__del__` when it has to go, in a thread of its own."""

    def __init__(self, engine: PlacingEngine, name: str) -> None:
        self._engine: PlacingEngine | None = engine
        self._name = name

    def __del__(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            with suppress(MetierError):  # it is out of service, or the engine is closing
                engine.send_delta_down(self._name)
