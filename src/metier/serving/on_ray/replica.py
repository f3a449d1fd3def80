"""A replica: one engine with the whole HTTP application, which the ingress asks by calls in place of connections."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

from ray import serve
from starlette.types import Message, Receive, Scope, Send

from metier.errors import EngineError, MetierError, UnknownDeltaError
from metier.serving.http.app import create_app
from metier.serving.http.errors import FailedAnswerError, as_api_error
from metier.serving.http.service import Service
from metier.serving.in_process import messages_of, post_scope
from metier.serving.on_ray.forwarded import Forwarded
from metier.serving.on_ray.names import NamedDelta
from metier.serving.on_ray.placement import Multiplexed, Placement
from metier.serving.on_ray.replica_state import ReplicaSettings, ReplicaState


class Replica:
    def __init__(self, settings: ReplicaSettings) -> None:
        """Raises:
        MetierError: as `start_engine`.
        """
        # here, so that whoever only deploys this does not load torch
        from transformers.utils.logging import disable_progress_bar

        from metier.serving.start import EngineSettings, start_engine

        disable_progress_bar()  # it would be passed on line by line
        folders = {delta.name: delta.folder for delta in settings.deltas}
        started = start_engine(
            settings.model, folders, dtype=settings.dtype, settings=EngineSettings(**settings.engine)
        )
        # who may ask was decided before; an answer that is not done when this is told to stop had its time
        http = replace(settings.http, api_key=None, allowed_hosts=(), grace_seconds=0.0)
        self._app = create_app(started.engine, started.tokenizer, settings.base_name, http)
        self._engine, self._service = started.engine, _service_of(self._app)
        self._placement = Placement(
            started.engine,
            self._service.metrics,
            _multiplex,
            budget_bytes=started.budgets.delta_bytes,
            deltas=settings.deltas,
        )
        self._memory, self._differences = str(started.budgets), started.differences

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[Message], None]:
        """The ASGI messages of the answer, as they come."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                if request.delta is not None:
                    await self._make_ready(request.delta)
            except Exception as error:
                await as_api_error(error).response()(scope, receive, send)
            else:
                await self._app(scope, receive, send)

        scope = post_scope(request.path, request.content_type, len(request.body))
        async for messages in messages_of(app, scope, request.body):
            yield messages

    async def put(self, delta: NamedDelta) -> MetierError | None:
        """As `Placement.put`; what it raises of ours is returned, since Ray would log it as a fault."""
        try:
            await self._placement.put(delta)
        except MetierError as error:
            return error
        return None

    async def forget(self, delta: NamedDelta) -> None:
        """As `Placement.forget`."""
        await self._placement.forget(delta)

    async def state(self) -> ReplicaState:
        return ReplicaState(
            replica=_own_id(),
            engine=self._engine.status(),
            deltas=tuple(self._engine.deltas()),
            max_length=self._engine.max_length,
            capacity=self._placement.capacity(),
            memory=self._memory,
            worst_difference=max(self._differences.values(), default=None),
        )

    async def metrics(self) -> tuple[str, bytes]:
        """Its id, and its metrics in Prometheus' text format."""
        return _own_id(), self._service.metrics.text()

    async def stop(self) -> None:
        """End what runs still, and answer no more."""
        await self._service.close()

    async def check_health(self) -> None:
        """Ray Serve starts another one in place of one whose engine has died."""
        status = self._engine.status()
        if not (status.is_alive or self._service.is_closing):
            raise EngineError(f"the engine has died: {status.error}")

    async def __del__(self) -> None:
        """Ray Serve calls this once the last request is over."""
        await self.stop()

    async def _make_ready(self, delta: NamedDelta) -> None:
        try:
            await self._placement.make_ready(delta)
        except (UnknownDeltaError, EngineError):
            raise
        except MetierError as error:
            # it is by no fault of who asks, and may name folders
            raise FailedAnswerError(str(error)) from error


def _multiplex(load: Multiplexed, num: int) -> Multiplexed:
    # a function, which Ray can put its book on
    async def load_by_id(name: str) -> object:
        return await load(name)

    multiplexed: Multiplexed = serve.multiplexed(load_by_id, max_num_models_per_replica=num)
    return multiplexed


def _own_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def _service_of(app: object) -> Service:
    service: Service = app.state.service  # type: ignore[attr-defined]
    return service
