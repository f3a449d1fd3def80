"""One question to many models over one connection: how the page at `/` asks.

A browser holds six HTTP/1.1 connections to a server at most. A page with a request for each model would see six answers
stream while the others wait, however many the engine runs in one batch. So the page sends one request that names the
models; here it becomes one request for each, put to the very application that answers everybody else, with the same
headers. Keys, limits, errors and metrics are therefore that application's, and none is decided here: it has to be put
around whatever checks them.

    POST /page/ask    {"id": …, "path": "/v1/chat/completions", "models": […], "body": {…}}, answered by events:
                      {"model", "status"} as an answer begins, {"model", "text"} for each piece of its body, and
                      {"model", "end": true}
    POST /page/stop   {"id": …, "model": …} ends one of them, as closing a connection of its own would
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metier.serving.in_process import receive_of

PATHS = ("/v1/chat/completions", "/v1/completions")

_MOST_TIMES = 4
"""How much more than one body those that are made of it may be in all."""

_log = logging.getLogger(__name__)
_Body = TypeVar("_Body", bound=BaseModel)


class _Ask(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=16, max_length=64)
    """Made up by who asks, and not to be guessed: whoever has it can stop the answers."""
    path: str
    models: list[str] = Field(min_length=1)
    body: dict[str, Any]


class _Stop(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    model: str


class Together:
    """An ASGI application around another: answers the two paths above, and hands all else on."""

    def __init__(
        self, app: ASGIApp, *, max_models: int = 256, max_body_bytes: int = 4 << 20, max_body_seconds: float = 30
    ) -> None:
        self._app = app
        self._max_models = max_models
        self._max_body_bytes = max_body_bytes
        self._max_body_seconds = max_body_seconds
        self._gone: dict[str, dict[str, asyncio.Event]] = {}
        """By id and model: set when nobody wants the answer any more."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = (scope["type"], scope.get("method"), scope.get("path", "").removeprefix(scope.get("root_path", "")))
        try:
            if route == ("http", "POST", "/page/ask"):
                await self._ask(scope, receive, send)
            elif route == ("http", "POST", "/page/stop"):
                await self._stop(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except ClientDisconnect:
            # it left before its question was there; nobody reads a reply
            return
        except _Refused as refusal:
            await _error(refusal.status, str(refusal))(scope, receive, send)

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await self._body(scope, receive)
        asked = _parsed(_Ask, raw)
        if asked.path not in PATHS:
            raise _Refused(400, f"/page/ask: path {asked.path!r} cannot be asked; use {' or '.join(PATHS)}.")
        if len(asked.models) > self._max_models:
            raise _Refused(400, f"/page/ask: {len(asked.models)} models; ask at most {self._max_models} at once.")
        if len(asked.models) * len(raw) > _MOST_TIMES * self._max_body_bytes:
            raise _Refused(413, "/page/ask: the question is too long for so many models; ask fewer at once.")
        if len(set(asked.models)) < len(asked.models):
            raise _Refused(400, "/page/ask: a model is named twice; name each once.")
        if asked.id in self._gone:
            raise _Refused(409, "/page/ask: this id is in use; make up another.")
        gone = {model: asyncio.Event() for model in asked.models}
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._gone[asked.id] = gone
        for model in asked.models:
            task = asyncio.create_task(self._answer(scope, asked, model, events, gone[model]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        lines = _lines(events, num_answers=len(gone))
        try:
            await StreamingResponse(lines, media_type="text/event-stream", headers=_UNBUFFERED)(scope, receive, send)
        finally:
            del self._gone[asked.id]
            for event in gone.values():
                event.set()

    async def _stop(self, scope: Scope, receive: Receive, send: Send) -> None:
        stop = _parsed(_Stop, await self._body(scope, receive))
        event = self._gone.get(stop.id, {}).get(stop.model)
        if event is None:
            raise _Refused(404, f"/page/stop: no answer of {stop.model!r} is under way by this id; it may be over.")
        event.set()
        await Response(status_code=204)(scope, receive, send)

    async def _answer(
        self, scope: Scope, asked: _Ask, model: str, events: asyncio.Queue[dict[str, Any]], gone: asyncio.Event
    ) -> None:
        """Put one model's request to the application, and its answer among the events."""
        body = json.dumps({**asked.body, "model": model}).encode()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        has_begun = False

        async def send(message: Message) -> None:
            nonlocal has_begun
            if gone.is_set():
                return
            if message["type"] == "http.response.start":
                has_begun = True
                events.put_nowait({"model": model, "status": message["status"]})
            elif message["type"] == "http.response.body":
                text = decoder.decode(message.get("body", b""))
                if text:
                    events.put_nowait({"model": model, "text": text})

        try:
            await self._app(_scope(scope, asked.path, len(body)), receive_of(body, gone), send)
        except Exception:
            _log.exception("%s: the answer of %r failed", asked.path, model)
            if not has_begun:
                events.put_nowait({"model": model, "status": 500})
        finally:
            events.put_nowait({"model": model, "end": True})

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        request = Request(scope, receive)
        # another site's form cannot send this type without being let to, so that it cannot ask by a visitor's browser
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise _Refused(415, f"{scope['path']}: send application/json.")
        body = bytearray()
        try:
            async with asyncio.timeout(self._max_body_seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self._max_body_bytes:
                        raise _Refused(413, f"{scope['path']}: the body is longer than {self._max_body_bytes} bytes.")
        except TimeoutError:
            raise _Refused(408, f"{scope['path']}: the body took over {self._max_body_seconds:g} s.") from None
        return bytes(body)


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# an answer that is compressed cannot be read as text on its way
_OF_THE_BODY = (b"content-length", b"transfer-encoding", b"accept-encoding")
_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def _lines(events: asyncio.Queue[dict[str, Any]], *, num_answers: int) -> AsyncIterator[str]:
    while num_answers > 0:
        ready = [await events.get()]
        while not events.empty():
            ready.append(events.get_nowait())
        num_answers -= sum("end" in event for event in ready)
        yield "".join(f"data: {json.dumps(event)}\n\n" for event in ready)


def _scope(scope: Scope, path: str, num_bytes: int) -> Scope:
    """The outer request's scope with another path and another body's length."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _OF_THE_BODY]
    path = scope.get("root_path", "") + path
    return {
        **scope,
        # of 2.3, a closed connection is told by `receive` alone; later ones want `send` to fail
        "asgi": {**scope["asgi"], "spec_version": "2.3"},
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [*headers, (b"content-length", str(num_bytes).encode())],
        "state": dict(scope.get("state", {})),
    }


def _parsed(kind: type[_Body], body: bytes) -> _Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise _Refused(400, f"{where}: {first['msg']}.") from None


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
