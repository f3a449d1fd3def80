"""Deltas in service: what `residency.py` decides is carried out here, by one thread, while requests are running.

That thread alone opens deltas, reads them, places and removes them. All other calls come from any thread and return at
once. A delta is in service, or resident, as a whole or not at all: others see it once the last step has been made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, get_args

from metier.errors import DeltaError, EngineError, UnknownDeltaError
from metier.serving.checked_reader import CheckedReader
from metier.serving.contract import DeltaStatus, Tier
from metier.serving.delta_source import open_served_delta
from metier.serving.loader_thread import LoaderThread, Work
from metier.serving.model_facts import ModelFacts
from metier.serving.moving import DeltaStore, Handle, Held, Mover
from metier.serving.residency import Move, Residency


@dataclass(slots=True)
class _Service:
    """What is promised of a delta."""

    created: int
    num_waiting: int = 0
    has_failed: bool = False
    """When it was loaded last; it is tried again once it is asked for."""
    is_sent_down: bool = False
    """Off the accelerator, once nobody uses it; until it is asked for again."""
    leaving: Future[None] | None = None


class Tiers(Generic[Handle]):
    """All deltas of one base, on the accelerator, the host and the disk.

    A request for a delta is counted from `ask` to `withdraw`, where it never starts, or by `acquire` to `release`.

    Args:
        facts: of the base.
        store: where deltas are placed.
        residency: empty.
        on_resident: called with a delta's name once requests may acquire it.
        on_failed: called with a delta's name and what is wrong, where it could not be loaded: requests that wait for it
            have to be told. Both are called in the loader's thread, and have to return at once.
        pins_host_memory: whether copies on the host lie in memory from which an accelerator copies by itself.
    """

    def __init__(
        self,
        *,
        facts: ModelFacts,
        store: DeltaStore[Handle],
        residency: Residency,
        on_resident: Callable[[str], None],
        on_failed: Callable[[str, DeltaError], None],
        pins_host_memory: bool = False,
    ) -> None:
        self._facts, self._residency = facts, residency
        self._on_resident, self._on_failed = on_resident, on_failed
        self._changed = threading.Condition(threading.RLock())
        self._reader = CheckedReader()
        self._mover = Mover(store, residency, self._changed, pins_host_memory=pins_host_memory)
        self._services: dict[str, _Service] = {}
        self._coming: dict[str, Future[DeltaStatus]] = {}
        self._wanted: list[str] = []
        self._is_closing = False
        self._error: BaseException | None = None
        self._thread = LoaderThread(self._changed, find_work=self._find_work, on_death=self._die)
        self._behind = LoaderThread(
            threading.Condition(), find_work=store.readying, on_death=self._die, name="delta-room", niceness=4
        )
        """Has room ready for the next delta."""

    @property
    def error(self) -> BaseException | None:
        """What the loader's thread died of."""
        return self._error

    def load(self, name: str, folder: Path, *, is_pinned: bool = False) -> Future[DeltaStatus]:
        """Put a delta into service: its files are checked, and it is made resident where nobody has to make way.

        The future raises:
            DeltaError, SelectionError: the name is taken, or as `open_served_delta` and `CheckedReader.read`.
            ServingError: it is larger than the room for deltas that are not pinned.
            EngineError: this is closing.
        """
        future: Future[DeltaStatus] = Future()
        with self._changed:
            self._check_alive()
            if name in self._services or name in self._coming:
                is_leaving = name in self._services and self._services[name].leaving is not None
                then = "Wait until its requests are over." if is_leaving else "Take that one out of service first."
                got = "one of that name is still going out of service" if is_leaving else "the name is taken"
                future.set_exception(DeltaError(f"delta {name!r}: {got}.\n{then}"))
                return future
            self._coming[name] = future
            self._thread.do(partial(self._load, name, folder, is_pinned))
        return future

    def unload(self, name: str) -> Future[None]:
        """Take a delta out of service: it cannot be asked for from now on; the future is done once those requests that
        asked before are over and nothing of it is left.

        Raises:
            UnknownDeltaError: no delta of that name is in service.
            EngineError: this is closing.
        """
        with self._changed:
            self._check_alive()
            service = self._in_service(name)
            service.leaving = Future()
            service.leaving.set_running_or_notify_cancel()  # so it cannot be cancelled
            self._remove_if_unused(name)
            return service.leaving

    def ask(self, name: str) -> None:
        """A request for a delta came. Of one that could not be loaded, it is tried again.

        Raises:
            UnknownDeltaError: no delta of that name is in service.
        """
        with self._changed:
            self._check_alive()
            service = self._in_service(name)
            service.num_waiting += 1
            service.is_sent_down = False
            self._residency.touch(name)
            if service.has_failed:
                service.has_failed = False
                self._thread.wake()

    def withdraw(self, name: str) -> None:
        """A request that asked will not start."""
        with self._changed:
            self._services[name].num_waiting -= 1
            self._remove_if_unused(name)
            self._thread.wake()

    @contextmanager
    def steady(self) -> Iterator[frozenset[str]]:
        """The deltas that those who asked for them can acquire; they stay so inside, which is not to take long."""
        with self._changed:
            yield self._residency.resident_names()

    def acquire(self, name: str) -> Handle:
        """A request that asked for a delta starts; only inside `steady`, which says that it can."""
        with self._changed:
            assert self._services[name].num_waiting > 0, f"nobody asked for {name}"
            self._residency.acquire(name)
            self._services[name].num_waiting -= 1
            handle = self._mover.held[name].handle
            assert handle is not None, f"{name} is resident without a handle"
            return handle

    def release(self, name: str) -> None:
        """A request that acquired a delta is over."""
        with self._changed:
            self._residency.release(name)
            self._remove_if_unused(name)
            self._thread.wake()

    def prefetch(self, names: Sequence[str]) -> None:
        """Which deltas are waited for, who has waited longest first; it holds until the next call."""
        with self._changed:
            if list(names) != self._wanted:
                self._wanted = list(names)
                self._thread.wake()

    def send_down(self, name: str) -> None:
        """Take a delta off the accelerator once nobody uses it, unless it is asked for anew before. A pinned one stays.

        Raises:
            UnknownDeltaError: no delta of that name is in service.
        """
        with self._changed:
            self._check_alive()
            self._in_service(name).is_sent_down = True
            self._thread.wake()

    def deltas(self) -> list[DeltaStatus]:
        """Those in service, in the order in which they came."""
        with self._changed:
            return [self._status(name) for name, service in self._services.items() if service.leaving is None]

    def delta_bytes(self) -> dict[Tier, int]:
        """Bytes of deltas in each tier."""
        with self._changed:
            return {tier: self._residency.num_bytes(tier) for tier in get_args(Tier)}

    def close(self) -> None:
        """End the loader's thread, once it has made the moves that it is at. What is not done by then fails."""
        with self._changed:
            self._is_closing = True
        self._thread.close()
        self._behind.close()
        self._reader.close()
        self._fail_futures()

    def _find_work(self) -> Work | None:
        for name, service in self._services.items():
            if service.is_sent_down and not service.num_waiting and (down := self._residency.send_down(name)):
                return partial(self._take_down, down)
        moves = self._residency.prefetch(self._wanted_now())
        return partial(self._bring_up, moves) if moves else None

    def _wanted_now(self) -> list[str]:
        """Who is pinned comes first, then who is waited for; not those that failed and were not asked for since."""
        pinned = [name for name in self._services if self._residency.is_pinned(name)]
        names = dict.fromkeys([*pinned, *self._wanted])
        return [name for name in names if name in self._services and not self._services[name].has_failed]

    def _take_down(self, moves: Sequence[Move]) -> None:
        error = self._mover.carry_out(moves)
        if error is not None:
            raise error  # its room is lost, and nobody waits who could be told

    def _bring_up(self, moves: Sequence[Move]) -> None:
        name = moves[-1].name
        error = self._mover.carry_out(moves)
        self._behind.wake()
        with self._changed:
            self._services[name].has_failed = error is not None
            is_resident = self._residency.is_resident(name)
        if error is not None:
            self._on_failed(name, error)
        elif is_resident:
            self._on_resident(name)

    def _load(self, name: str, folder: Path, is_pinned: bool) -> None:
        future, error = self._coming[name], None
        is_wanted = future.set_running_or_notify_cancel()
        try:
            status = self._put_into_service(name, folder, is_pinned) if is_wanted else None
        except Exception as cause:
            error = cause
        with self._changed:
            del self._coming[name]
        # last: whoever hears of it may ask for the name at once
        if error is not None:
            future.set_exception(error)
        elif status is not None:
            future.set_result(status)

    def _put_into_service(self, name: str, folder: Path, is_pinned: bool) -> DeltaStatus:
        delta = open_served_delta(folder, facts=self._facts, reader=self._reader)
        with self._changed:
            num_bytes = delta.num_bytes
            self._residency.add(name, accelerator_bytes=num_bytes, host_bytes=num_bytes, is_pinned=is_pinned)
            self._mover.held[name] = Held(delta)
            # a request may come soon or never, so others make way for it only once one has
            moves = self._residency.make_room(name, keeping=self._services.keys())
        try:
            error = self._mover.carry_out(moves) if moves else None
            if error is not None:
                raise error
            if not moves:
                delta.check()
            self._behind.wake()
        except BaseException:
            self._take_away(name)
            raise
        with self._changed:
            self._services[name] = _Service(created=int(time.time()))
            self._thread.wake()
            return self._status(name)

    def _remove_if_unused(self, name: str) -> None:
        service = self._services[name]
        if service.leaving is not None and not service.num_waiting and not self._residency.num_users(name):
            self._thread.do(partial(self._remove, name, service.leaving))

    def _remove(self, name: str, leaving: Future[None]) -> None:
        error = self._take_away(name)
        with self._changed:
            del self._services[name]
            self._thread.wake()
        if error is None:
            leaving.set_result(None)
        else:
            leaving.set_exception(error)

    def _take_away(self, name: str) -> DeltaError | None:
        with self._changed:
            moves = self._residency.drop(name)
        error = self._mover.carry_out(moves)
        with self._changed:
            self._residency.forget(name)
            del self._mover.held[name]
        return error

    def _in_service(self, name: str) -> _Service:
        service = self._services.get(name)
        if service is None or service.leaving is not None:
            raise UnknownDeltaError(
                f"delta {name!r}: no delta of that name is served.\nName one that is, or put it into service first."
            )
        return service

    def _status(self, name: str) -> DeltaStatus:
        delta, book = self._mover.held[name].delta, self._residency
        return DeltaStatus(
            name=name,
            folder=delta.folder,
            kind=delta.kind,
            tier=book.tier(name),
            num_bytes=delta.num_bytes,
            is_pinned=book.is_pinned(name),
            num_running=book.num_users(name),
            created=self._services[name].created,
        )

    def _check_alive(self) -> None:
        if self._is_closing or self._error is not None:
            raise self._dead()

    def _dead(self) -> EngineError:
        if self._error is None:
            return EngineError("the server is closing, so no delta is loaded or unloaded any more.")
        return EngineError(f"the thread that loads deltas has died ({self._error!r:.200}). Start the server again.")

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            waiting = [name for name, service in self._services.items() if service.num_waiting]
        self._fail_futures()
        for name in waiting:
            self._on_failed(name, DeltaError(f"delta {name!r}: {self._dead()}"))

    def _fail_futures(self) -> None:
        with self._changed:
            leaving = [service.leaving for service in self._services.values() if service.leaving is not None]
            futures: list[Future[Any]] = [*self._coming.values(), *leaving]
        for future in futures:
            with suppress(InvalidStateError):  # it is done, or was cancelled
                future.set_exception(self._dead())
