"""An answer as server-sent events: each chunk a `data:` line of JSON, then `data: [DONE]`.

The status has gone out before the first token, so that an error after it is an event like the others, with `error`
in place of `choices`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from metier.serving.http.disconnect import ClientGoneError, unless_disconnected
from metier.serving.http.errors import as_api_error
from metier.serving.http.shape import Json

EVENT_STREAM = "text/event-stream"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends `chunks` as they come; `on_end` is called in any case, also where the client leaves before the start."""

    def __init__(self, chunks: AsyncGenerator[Json, None], on_end: Callable[[], None]) -> None:
        super().__init__(media_type=EVENT_STREAM, headers=_HEADERS)
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(send))
        except ClientGoneError:
            pass
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await send(_event(json.dumps(chunk)))
        except Exception as error:
            await send_end(send, error)
        else:
            await send_end(send)


async def send_end(send: Send, error: Exception | None = None) -> None:
    """The last events of a stream: the error that ended it, if one did, and `[DONE]`."""
    if error is not None:
        await send(_event(json.dumps(as_api_error(error).body)))
    await send({**_event("[DONE]"), "more_body": False})


def _event(data: str) -> dict[str, object]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
