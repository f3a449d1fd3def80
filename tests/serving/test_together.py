"""One question to many models over one connection: what each is asked, what comes back, and stopping."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from metier.serving.together import Together

ID = "0123456789abcdef"
JSON = [(b"content-type", b"application/json")]


class Caller:
    """One HTTP request to an application, and what comes back."""

    def __init__(self, app: Any, path: str, body: Any, *, headers: Any = JSON, **scope: Any) -> None:
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": headers,
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            **scope,
        }
        self.status: int | None = None
        self.body = ""
        self.has_left = asyncio.Event()
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._messages: list[Message] = [{"type": "http.request", "body": sent, "more_body": False}]
        if body is None:
            self._messages.clear()
        self.done = asyncio.create_task(app(self.scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"").decode()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line.removeprefix("data: ")) for line in self.body.split("\n\n")[:-1]]

    def text(self, model: str) -> str:
        return "".join(event.get("text", "") for event in self.events if event["model"] == model)

    def has_ended(self, model: str) -> bool:
        return {"model": model, "end": True} in self.events


class Inner:
    """The application that is asked: keeps what it gets, and answers as `answers` says of a model."""

    def __init__(self, **answers: Callable[[Receive, Send], Awaitable[None]]) -> None:
        self.answers = answers
        self.scopes: dict[str, Scope] = {}
        self.bodies: dict[str, dict[str, Any]] = {}
        self.left: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        model = body["model"]
        self.scopes[model], self.bodies[model] = scope, body
        await self.answers.get(model, say("fine"))(receive, send)

    def endless(self, model: str) -> Callable[[Receive, Send], Awaitable[None]]:
        async def answer(receive: Receive, send: Send) -> None:
            await say("on and", more=True)(receive, send)
            assert (await receive())["type"] == "http.disconnect"
            self.left.add(model)

        return answer


def say(*pieces: str | bytes, status: int = 200, more: bool = False) -> Callable[[Receive, Send], Awaitable[None]]:
    async def answer(receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        for piece in pieces:
            body = piece.encode() if isinstance(piece, str) else piece
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if not more:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return answer


def asked(*models: str, **changes: Any) -> dict[str, Any]:
    return {"id": ID, "path": "/v1/completions", "models": list(models), "body": {"prompt": "Hi"}, **changes}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


def test_each_model_is_asked_with_the_same_body_and_headers() -> None:
    async def run() -> None:
        inner = Inner()
        headers = [*JSON, (b"authorization", b"Bearer k"), (b"content-length", b"999"), (b"accept-encoding", b"gzip")]
        call = Caller(Together(inner), "/page/ask", asked("a", "b"), headers=headers, query_string=b"x=1")
        await call.done
        assert call.status == 200
        assert inner.bodies == {name: {"prompt": "Hi", "model": name} for name in ("a", "b")}
        length = str(len(json.dumps(inner.bodies["a"]))).encode()
        assert inner.scopes["a"]["headers"] == [
            *JSON,
            (b"authorization", b"Bearer k"),
            (b"content-length", length),
        ]
        assert (inner.scopes["a"]["path"], inner.scopes["a"]["query_string"]) == ("/v1/completions", b"")

    asyncio.run(run())


def test_status_text_and_end_of_each_come_back() -> None:
    async def run() -> None:
        call = Caller(Together(Inner(a=say("x", "y"), b=say("no", status=404))), "/page/ask", asked("a", "b"))
        await call.done
        assert [event for event in call.events if event["model"] == "a"] == [
            {"model": "a", "status": 200},
            {"model": "a", "text": "x"},
            {"model": "a", "text": "y"},
            {"model": "a", "end": True},
        ]
        assert {"model": "b", "status": 404} in call.events
        assert call.text("b") == "no"

    asyncio.run(run())


def test_a_slow_model_holds_no_other_up() -> None:
    async def run() -> None:
        goes_on = asyncio.Event()

        async def slow(receive: Receive, send: Send) -> None:
            await goes_on.wait()
            await say("late")(receive, send)

        call = Caller(Together(Inner(slow=slow)), "/page/ask", asked("slow", "quick"))
        await until(lambda: call.has_ended("quick"))
        assert not call.has_ended("slow")
        goes_on.set()
        await call.done
        assert call.text("slow") == "late"

    asyncio.run(run())


def test_a_letter_cut_in_two_comes_whole() -> None:
    async def run() -> None:
        call = Caller(Together(Inner(a=say("é".encode()[:1], "é".encode()[1:]))), "/page/ask", asked("a"))
        await call.done
        assert call.text("a") == "é"

    asyncio.run(run())


def test_stopping_one_tells_it_alone_that_its_client_left() -> None:
    async def run() -> None:
        inner = Inner()
        inner.answers = {"a": inner.endless("a"), "b": inner.endless("b")}
        app = Together(inner)
        call = Caller(app, "/page/ask", asked("a", "b"))
        await until(lambda: call.text("a") == call.text("b") == "on and")
        stop = Caller(app, "/page/stop", {"id": ID, "model": "a"})
        await stop.done
        await until(lambda: call.has_ended("a"))
        assert (stop.status, inner.left, call.has_ended("b")) == (204, {"a"}, False)
        call.has_left.set()
        await call.done

    asyncio.run(run())


def test_a_client_that_leaves_is_told_to_every_model() -> None:
    async def run() -> None:
        inner = Inner()
        inner.answers = {name: inner.endless(name) for name in "ab"}
        app = Together(inner)
        call = Caller(app, "/page/ask", asked("a", "b"))
        await until(lambda: len(inner.bodies) == 2)
        call.has_left.set()
        await call.done
        await until(lambda: inner.left == {"a", "b"})
        again = Caller(app, "/page/ask", asked("c"))
        await again.done
        assert again.text("c") == "fine", "the id is free again"

    asyncio.run(run())


def test_a_fault_of_the_application_is_a_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async def crash(receive: Receive, send: Send) -> None:
            raise RuntimeError("secret")

        call = Caller(Together(Inner(a=crash)), "/page/ask", asked("a", "b"))
        await call.done
        assert {"model": "a", "status": 500} in call.events
        assert call.has_ended("a")
        assert call.text("b") == "fine"
        assert "secret" not in call.body

    asyncio.run(run())
    assert "the answer of 'a' failed" in caplog.text


@pytest.mark.parametrize("path", ["/v1/completions", "/page/page.js"])
def test_all_else_is_handed_on_as_it_is(path: str) -> None:
    async def run() -> None:
        inner = Inner()
        call = Caller(Together(inner), path, {"model": "a"})
        await call.done
        assert inner.scopes["a"] is call.scope
        assert call.body == "fine"

    asyncio.run(run())


def test_a_prefix_of_the_servers_paths_is_kept() -> None:
    async def run() -> None:
        inner = Inner()
        await Caller(Together(inner), "/proxy/page/ask", asked("a"), root_path="/proxy").done
        assert inner.scopes["a"]["path"] == "/proxy/v1/completions"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (asked("a", path="/v1/load_lora_adapter"), 400, "path '/v1/load_lora_adapter' cannot be asked; use /v1/chat"),
        (asked("a", "b", "a"), 400, "a model is named twice"),
        (asked("a", "b", "c", "d"), 400, "4 models; ask at most 3 at once"),
        (asked(), 400, "models: List should have at least 1 item"),
        (asked("a", id="guess"), 400, "id: String should have at least 16 characters"),
        (asked("a", extra=1), 400, "extra: Extra inputs are not permitted"),
        (b"{", 400, "Invalid JSON"),
        (asked("a", body={"prompt": "x" * 500}), 413, "the body is longer than 400 bytes"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_openais_format(body: Any, status: int, message: str) -> None:
    async def run() -> None:
        inner = Inner()
        call = Caller(Together(inner, max_models=3, max_body_bytes=400), "/page/ask", body)
        await call.done
        assert call.status == status
        assert message in json.loads(call.body)["error"]["message"]
        assert inner.bodies == {}

    asyncio.run(run())


def test_a_body_that_does_not_come_is_refused() -> None:
    async def run() -> None:
        call = Caller(Together(Inner(), max_body_seconds=0.01), "/page/ask", None)
        await call.done
        assert call.status == 408

    asyncio.run(run())


def test_a_client_that_leaves_within_its_question_is_let_go() -> None:
    async def run() -> None:
        call = Caller(Together(Inner()), "/page/ask", None)
        call.has_left.set()
        await call.done
        assert call.status is None

    asyncio.run(run())


def test_a_form_of_another_site_cannot_ask() -> None:
    async def run() -> None:
        call = Caller(Together(Inner()), "/page/ask", asked("a"), headers=[(b"content-type", b"text/plain")])
        await call.done
        assert call.status == 415

    asyncio.run(run())


def test_an_id_in_use_is_refused() -> None:
    async def run() -> None:
        inner = Inner()
        inner.answers = {"a": inner.endless("a")}
        app = Together(inner)
        first = Caller(app, "/page/ask", asked("a"))
        await until(lambda: first.text("a") != "")
        second = Caller(app, "/page/ask", asked("b"))
        await second.done
        assert (second.status, "b" in inner.bodies) == (409, False)
        first.has_left.set()
        await first.done

    asyncio.run(run())


@pytest.mark.parametrize("stop", [{"id": "f" * 16, "model": "a"}, {"id": ID, "model": "b"}])
def test_stopping_what_is_not_under_way_is_refused(stop: dict[str, str]) -> None:
    async def run() -> None:
        inner = Inner()
        inner.answers = {"a": inner.endless("a")}
        app = Together(inner)
        call = Caller(app, "/page/ask", asked("a"))
        await until(lambda: call.text("a") != "")
        refused = Caller(app, "/page/stop", stop)
        await refused.done
        assert (refused.status, inner.left) == (404, set())
        call.has_left.set()
        await call.done

    asyncio.run(run())
