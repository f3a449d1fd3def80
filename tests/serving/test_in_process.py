"""An application that is asked within the process, as the ingress' requests are on a replica."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from metier.serving.http.app import create_app
from metier.serving.http.settings import HttpSettings
from metier.serving.in_process import messages_of, post_scope
from serving.fake_engine import FakeEngine
from serving.http.serving_app import BASE, chat
from serving.made_tokenizers import byte_level


def ask(engine: FakeEngine, **fields: Any) -> Any:
    app = create_app(engine, engine.tokenizer, BASE, HttpSettings())
    body = json.dumps(chat(**fields)).encode()
    return messages_of(app, post_scope("/v1/chat/completions", "application/json", len(body)), body)


async def whole(messages: Any) -> list[Message]:
    return [message async for several in messages for message in several]


def test_an_answer_comes_as_from_a_server() -> None:
    start, body, *_ = asyncio.run(whole(ask(FakeEngine(byte_level()))))
    assert start["status"] == 200
    assert json.loads(body["body"])["choices"][0]["message"]["content"] == "Answer of law."


def test_a_stream_comes_piece_by_piece() -> None:
    engine = FakeEngine(byte_level(), hold_after=1)

    async def body() -> None:
        messages = ask(engine, stream=True)
        first = await anext(messages)
        assert first[0]["type"] == "http.response.start"
        while not engine.generations[0].num_given:
            await anext(messages)
        engine.hold_after = None
        rest = await whole(messages)
        assert rest[-1]["body"] == b"data: [DONE]\n\n"
        assert not rest[-1]["more_body"]

    asyncio.run(body())


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_leaves_early_ends_the_answer(is_stream: bool) -> None:
    engine = FakeEngine(byte_level(), hold_after=1)

    async def body() -> None:
        messages = ask(engine, stream=is_stream)
        waiting = asyncio.create_task(whole(messages))
        while not (engine.generations and engine.generations[0].num_given):
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await messages.aclose()
        assert engine.generations[0].is_cancelled

    asyncio.run(body())


def test_what_the_application_raises_comes_after_what_it_sent() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"?"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("broken")

    async def body() -> None:
        messages = messages_of(app, post_scope("/", "text/plain", 1), b"?")
        assert [message["type"] for message in await anext(messages)] == ["http.response.start"]
        with pytest.raises(RuntimeError, match="broken"):
            await anext(messages)

    asyncio.run(body())
