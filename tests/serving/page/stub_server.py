"""A server with the endpoints that the page speaks to: no model, and answers that a test foresees.

A model's name says how it answers: see `StubServer._pieces`. `release` is what an answer waits for after its third
word, so that a test can look at answers under way for as long as it likes.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

import metier.serving
from html_page import HOSTILE
from metier.serving.together import Together

BASE = "tiny-base"
WORDS = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
ANSWER = " ".join(WORDS)
LAYERS, NUM_EXPERTS = (1, 2, 5), 8
REPLACED = [[0, 3], [], [7]]
COUNTS = [[(3 * expert + layer) % 7 * 2 for expert in range(NUM_EXPERTS)] for layer in LAYERS]
_PAGE = next(iter(metier.serving.__path__)) + "/page"
# stricter than `default-src 'self'`
_POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
}


class StubServer:
    def __init__(self) -> None:
        self.reset()
        self._server = uvicorn.Server(uvicorn.Config(Together(self._app()), port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"

    def reset(self) -> None:
        self.deltas = ["law", "code"]
        self.key: str | None = None
        self.health: tuple[int, dict[str, Any]] = (200, {"status": "ok"})
        self.word_seconds = 0.001
        self.release = threading.Event()
        self.release.set()
        self.bodies: list[dict[str, Any]] = []
        """Of all requests for an answer, in the order that they came in."""
        self.running: set[str] = set()
        self.left: set[str] = set()
        """Models whose client went away before the end."""

    def close(self) -> None:
        self.release.set()
        self._server.should_exit = True
        self._thread.join()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/")
        async def _root() -> Response:
            return FileResponse(f"{_PAGE}/index.html", headers=_POLICY)

        @app.get("/page/{name}")
        async def _file(name: str) -> Response:
            return FileResponse(f"{_PAGE}/{name}", headers=_POLICY)

        @app.get("/health")
        async def _health() -> Response:
            return JSONResponse(self.health[1], self.health[0])

        @app.get("/v1/models")
        async def _models(request: Request) -> Any:
            if not self._takes_key_of(request):
                return _error(401, "no such key")
            deltas = [{"id": name, "object": "model", "parent": BASE} for name in self.deltas]
            return {"object": "list", "data": [{"id": BASE, "object": "model", "parent": None}, *deltas]}

        app.post("/v1/chat/completions")(self._answer)
        app.post("/v1/completions")(self._answer)
        return app

    def _takes_key_of(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def _answer(self, request: Request) -> Response:
        if not self._takes_key_of(request):
            return _error(401, "no such key")
        body = {**await request.json(), "path": request.url.path}
        self.bodies.append(body)
        if body["model"] == "missing":
            return _error(404, "no delta 'missing' is served")
        if body["model"] == "crashes":
            raise RuntimeError("a fault of the server")
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        model = body["model"]
        is_chat = body["path"].endswith("/chat/completions")
        self.running.add(model)
        is_whole = False
        try:
            async for data in self._pieces(model, is_chat=is_chat):
                yield f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
            is_whole = True
        finally:
            self.running.discard(model)
            if not is_whole:
                self.left.add(model)

    async def _pieces(self, model: str, *, is_chat: bool) -> AsyncIterator[dict[str, Any] | str]:
        words = _words(model)
        for index, word in enumerate(words):
            while index == 3 and not self.release.is_set():
                await asyncio.sleep(0.005)
            if index == 2 and model == "breaks":
                yield {"error": {"message": "the engine has died", "type": "server_error"}}
                return
            if index == 2 and model == "garbled":
                yield "{no json"
            text = word if index == 0 else f" {word}"
            yield {"choices": [{"index": 0, **({"delta": {"content": text}} if is_chat else {"text": text})}]}
            await asyncio.sleep(self.word_seconds)
        if model == "ends-early":
            return
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "length" if model == "long" else "stop"}]}
        replaced = [[] for _ in LAYERS] if model == BASE else REPLACED
        experts = {"layers": LAYERS, "counts": COUNTS, "replaced": replaced}
        if model == "no-experts":
            experts = {"layers": [], "counts": [], "replaced": []}
        if model == "odd-experts":
            experts = {"layers": [1]}
        yield {
            "choices": [],
            "usage": {"prompt_tokens": 11, "completion_tokens": len(words), "total_tokens": 11 + len(words)},
            "metier": {
                "experts": experts,
                "seconds": 0.5,
                "tokens_per_second": 321.0,
            },
        }
        yield "[DONE]"


def _words(model: str) -> list[str]:
    if model == "hostile":
        return HOSTILE.split(" ")
    if model == "endless":
        return ["on"] * 100_000
    return {"code": [*WORDS[:4], "sleeps"], "brief": WORDS[:5]}.get(model, WORDS)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)
