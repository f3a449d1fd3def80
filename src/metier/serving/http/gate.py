"""What every request passes before it reaches an endpoint: host, key, size, and room; and what no error gets past.

An ASGI middleware of its own rather than several: the order matters. A body is read here, up to its limit and in its
time, before the request counts as one that is answered.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metier.serving.http.disconnect import ClientGoneError
from metier.serving.http.errors import ApiError, as_api_error, overloaded, unavailable
from metier.serving.http.front import Front

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
OPEN = frozenset({"/", "/health"})
OPEN_FOLDER = "/page/"


class Gate:
    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app = app
        self._front = front
        self._settings = front.settings
        self._num_answering = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def watched_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive) if scope["method"] == "POST" else None
            await self._pass(scope, receive if body is None else _replayed(body, receive), watched_send)
        except ClientGoneError:
            return
        except Exception as error:
            told = as_api_error(error)
            # of a response that has begun nothing can be taken back; the connection is closed in its middle
            if not has_started:
                await told.response()(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if not self._settings.accepts_host(headers.get("host")):
            raise ApiError(
                403,
                f"This server does not go by the name {headers.get('host', '')[:100]!r}. Start it with "
                "--allow-host NAME if it should.",
                code="host_not_allowed",
            )
        is_open = path in OPEN or path.startswith(OPEN_FOLDER)
        if not is_open and not self._settings.accepts_key(headers.get("authorization")):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._front.is_closing and scope["method"] == "POST":
            raise unavailable("The server is closing; ask again later, or another one.")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most_bytes, most_seconds = self._settings.max_body_bytes, self._settings.max_body_seconds
        too_large = ApiError(
            413, f"The body has more than {most_bytes} bytes, which is the most here.", code="body_too_large"
        )
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most_bytes:
            raise too_large
        chunks, num_bytes = [], 0
        try:
            async with asyncio.timeout(most_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunks.append(message.get("body", b""))
                    num_bytes += len(chunks[-1])
                    if num_bytes > most_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {most_seconds:g} s.", code="body_too_slow") from None

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in GENERATING:
            await self._app(scope, receive, send)
            return
        if self._num_answering >= self._settings.max_concurrent:
            raise overloaded(f"{self._num_answering} requests are being answered, the most here. Try again shortly.")
        self._num_answering += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_answering -= 1


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, and then what comes after it."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
