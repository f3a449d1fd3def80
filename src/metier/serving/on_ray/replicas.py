"""All replicas at once, as a service of deltas: what each is told, and what they say together.

What the replicas say is looked up before it is asked for (`look`), since the endpoints read it without waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from metier.errors import EngineError, MetierError, RequestError
from metier.serving.contract import DeltaStatus, EngineStatus, Tier
from metier.serving.on_ray.names import NamedDelta, Names
from metier.serving.on_ray.replica_state import ReplicaState

_LOOK_SECONDS = 10.0
"""For all replicas to say how they are."""
_TIERS: tuple[Tier, ...] = ("accelerator", "host", "disk")
_NOBODY = "no replica of the engine is running; Ray Serve starts them. Try again later."
Keep = Callable[[Sequence[NamedDelta]], Awaitable[None]]
Result = TypeVar("Result")


class Replicas:
    """A `DeltaService` over a deployment.

    Args:
        handle: of the deployment.
        names: what is served.
        keep: called with what is served from now on, before it is.
    """

    def __init__(self, handle: DeploymentHandle, names: Names, keep: Keep) -> None:
        self._handle, self._names, self._keep = handle, names, keep
        self.states: list[ReplicaState] = []
        """Of those that answered when they were looked at last."""
        self._max_length: int | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def look(self) -> None:
        """Ask the replicas how they are."""
        try:
            told = await self._ask_all("state", seconds=_LOOK_SECONDS)
        except EngineError:
            told = []
        self.states = [state for state in told if isinstance(state, ReplicaState)]
        if self.states:
            self._max_length = min(state.max_length for state in self.states)

    @property
    def max_length(self) -> int:
        if self._max_length is None:
            raise EngineError(_NOBODY)
        return self._max_length

    def status(self) -> EngineStatus:
        engines = [state.engine for state in self.states]
        is_alive = any(engine.is_alive for engine in engines)
        errors = [engine.error for engine in engines if engine.error is not None]
        return EngineStatus(
            is_alive=is_alive,
            error=None if is_alive else next(iter(errors), _NOBODY),
            num_running=sum(engine.num_running for engine in engines),
            num_waiting=sum(engine.num_waiting for engine in engines),
            cache_used=sum(engine.cache_used for engine in engines) / max(1, len(engines)),
            delta_bytes={tier: sum(engine.delta_bytes[tier] for engine in engines) for tier in _TIERS},
        )

    def deltas(self) -> list[DeltaStatus]:
        """Those that are served; each in the highest tier that it has on any replica."""
        return [self._status(delta) for delta in self._names.all()]

    async def load_delta(self, name: str, folder: Path, *, is_pinned: bool = False) -> DeltaStatus:
        """As `DeltaService.load_delta`, on every replica; those that start later do it with the first request."""
        if is_pinned:
            raise RequestError(
                "pinned: Ray Serve decides which replica holds which deltas, so none can be pinned. Leave it out."
            )
        await self._to_its_end(self._load(name, folder))
        return next(status for status in self.deltas() if status.name == name)

    async def unload_delta(self, name: str) -> None:
        """As `DeltaService.unload_delta`, on every replica."""
        await self._to_its_end(self._unload(name))

    async def metrics(self) -> dict[str, bytes]:
        """The metrics of each replica that answers, by its id.

        Raises:
            EngineError: none does.
        """
        told = await self._ask_all("metrics", seconds=_LOOK_SECONDS)
        return dict(each for each in told if not isinstance(each, BaseException))

    async def stop(self) -> None:
        """End what runs still, on every replica."""
        await self._ask_all("stop", seconds=_LOOK_SECONDS)

    async def _load(self, name: str, folder: Path) -> None:
        with self._names.coming(name, folder) as delta:
            try:
                _raise_first(await self._ask_all("put", delta))
                await self._keep([*self._names.all(), delta])
            except BaseException:
                await self._ask_all("forget", delta)
                raise

    async def _unload(self, name: str) -> None:
        with self._names.leaving(name) as delta:
            try:
                await self._keep(self._names.all())
            except BaseException:
                self._names.restore(delta)
                raise
            # where a replica has died meanwhile, nothing of it is left there
            await self._ask_all("forget", delta)

    async def _to_its_end(self, change: Coroutine[Any, Any, None]) -> None:
        """Whether or not the client waits for it: a change is made whole."""
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _ask_all(self, method: str, *args: object, seconds: float | None = None) -> list[Any]:
        """What each replica that runs returns, or the error that it raises or died of.

        Raises:
            EngineError: none runs, or they do not all answer in that time.
        """
        try:
            response = self._handle.broadcast(method, *args)
            return list(await response.results_async(timeout_s=seconds, return_exceptions=True))
        except DeploymentUnavailableError as error:
            raise EngineError(_NOBODY) from error
        except TimeoutError as error:
            raise EngineError(f"the replicas did not all answer within {seconds:g} s. Try again later.") from error

    def _status(self, delta: NamedDelta) -> DeltaStatus:
        told = [
            status
            for state in self.states
            for status in state.deltas
            if (status.name, status.folder) == (delta.name, delta.folder)
        ]
        return DeltaStatus(
            name=delta.name,
            folder=delta.folder,
            kind=next((status.kind for status in told), "unknown"),
            tier=min((status.tier for status in told), key=_TIERS.index, default="disk"),
            num_bytes=max((status.num_bytes for status in told), default=0),
            is_pinned=False,
            num_running=sum(status.num_running for status in told),
            created=delta.since_ns // 10**9,
        )


def _raise_first(told: Sequence[Any]) -> None:
    """The first error of ours; else of others, in a word of ours."""
    errors = [error for error in told if isinstance(error, Exception)]
    for error in errors:
        if isinstance(error, MetierError):
            raise error
    for error in errors:
        raise EngineError(f"a replica did not answer ({type(error).__name__}). Try again later.") from error
