"""The ingress: what Ray Serve's HTTP proxy hands all requests to. There is one, which alone knows what is served.

What requests load and unload is kept by an actor beside it, so that one which Ray Serve starts anew knows it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from metier.errors import EngineError
from metier.serving.http.settings import HttpSettings
from metier.serving.on_ray.front_app import create_front_app
from metier.serving.on_ray.names import NamedDelta, Names
from metier.serving.on_ray.ray_front import RayFront
from metier.serving.on_ray.replica_state import ReplicaState
from metier.serving.on_ray.replicas import Replicas

KEEPER = "names"
_IDLE_SECONDS = 0.02
"""Between two looks whether all requests are over."""
_FLUSH_SECONDS = 5.0
"""For the last bytes of answers that are done, after the engines have stopped."""


class Keeper:
    """An actor that keeps what is served."""

    def __init__(self, deltas: Sequence[NamedDelta]) -> None:
        self._deltas = list(deltas)

    def get(self) -> list[NamedDelta]:
        return self._deltas

    def put(self, deltas: Sequence[NamedDelta]) -> None:
        self._deltas = list(deltas)


class Ingress:
    """A deployment by `serve.ingress()`, which asks it for its application.

    Args:
        handle: of the replicas.
        base_name: the `model` of requests to the base itself.
        settings: of the whole server.
        deltas: served from the start.
    """

    def __init__(
        self, handle: DeploymentHandle, base_name: str, settings: HttpSettings, deltas: Sequence[NamedDelta]
    ) -> None:
        self._handle, self._base_name, self._settings, self._deltas = handle, base_name, settings, deltas

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        deltas = await _keeper().get.remote() if self._settings.allows_loading else self._deltas
        names = Names(deltas)
        self._front = RayFront(self._base_name, self._settings, Replicas(self._handle, names, _keep))
        return create_front_app(self._front, names, self._handle)

    async def states(self) -> list[ReplicaState]:
        """Of all replicas."""
        await self._front.engine.look()
        return self._front.engine.states

    async def close(self) -> None:
        """Refuse new requests, let the running ones finish for as long as they may, then end them."""
        self._front.is_closing = True
        await self._until_idle(self._settings.grace_seconds)
        with suppress(EngineError):  # there is no replica
            await self._front.engine.stop()
        await self._until_idle(_FLUSH_SECONDS)

    async def _until_idle(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._front.num_forwarded:
                    await asyncio.sleep(_IDLE_SECONDS)


async def _keep(deltas: Sequence[NamedDelta]) -> None:
    try:
        await _keeper().put.remote(deltas)
    except (RayActorError, ValueError) as error:
        raise EngineError("what is served cannot be kept just now, so nothing is changed. Try again later.") from error


def _keeper() -> ActorHandle:
    # by its name each time: Ray Serve starts another one in place of one that died
    return serve.get_deployment_actor(KEEPER)
