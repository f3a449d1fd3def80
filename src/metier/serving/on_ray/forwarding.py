"""What the ingress does with requests that are to be answered: find the delta, and pass them on to a replica.

Ray Serve picks the replica by the delta's name, which it is told as the id of a multiplexed model: one that holds the
delta, else one that holds the fewest. The answer comes back as it is made; a client that leaves ends it there too.
"""

from __future__ import annotations

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metier.errors import EngineError
from metier.serving.http.disconnect import unless_disconnected
from metier.serving.http.event_stream import EVENT_STREAM, send_end
from metier.serving.http.front import delta_named
from metier.serving.http.gate import GENERATING
from metier.serving.on_ray.forwarded import Forwarded, model_in
from metier.serving.on_ray.names import NamedDelta, Names
from metier.serving.on_ray.ray_front import RayFront


class Forwarding:
    """An ASGI application around another, which gets all other requests. It stands behind the gate."""

    def __init__(self, app: ASGIApp, front: RayFront, handle: DeploymentHandle, names: Names) -> None:
        self._app, self._front, self._names = app, front, names
        self._handle = handle.options(method_name="answer", stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING:
            # the gate has read it and gives it whole
            body: bytes = (await receive())["body"]
            content_type = Headers(scope=scope).get("content-type", "")
            request = Forwarded(scope["path"], content_type, body, self._delta(body))
            self._front.num_forwarded += 1
            try:
                await unless_disconnected(receive, self._pass_on(request, send))
            finally:
                self._front.num_forwarded -= 1
        else:
            await self._app(scope, receive, send)

    def _delta(self, body: bytes) -> NamedDelta | None:
        model = model_in(body)
        if model is None:
            return None
        name = delta_named(model, self._front.base_name, [delta.name for delta in self._names.all()])
        return None if name is None else self._names.get(name)

    async def _pass_on(self, request: Forwarded, send: Send) -> None:
        model_id = "" if request.delta is None else request.delta.name
        answer = self._handle.options(multiplexed_model_id=model_id).remote(request)
        start: Message | None = None
        try:
            async for messages in answer:
                for message in messages:
                    if message["type"] == "http.response.start":
                        start = message
                    await send(message)
        except Exception as error:
            ours = _as_ours(error)
            if start is None:
                raise ours from error
            if not Headers(raw=start["headers"]).get("content-type", "").startswith(EVENT_STREAM):
                raise
            await send_end(send, ours)
        finally:
            answer.cancel()


def _as_ours(error: Exception) -> Exception:
    """Ray's word for a replica that is gone, in ours; others as they are."""
    if isinstance(error, (RayActorError, DeploymentUnavailableError, RequestCancelledError)):
        return EngineError("the replica of the engine that was to answer is gone; Ray Serve starts another. Ask again.")
    return error
