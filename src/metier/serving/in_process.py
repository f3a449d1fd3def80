"""Ask an ASGI application in this process, as a server would by a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Receive, Scope


def receive_of(body: bytes, gone: asyncio.Event) -> Receive:
    """A `receive` that gives a whole body, and the end of the connection once `gone` is set."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


def post_scope(path: str, content_type: str, num_bytes: int) -> Scope:
    """The scope of a POST request with a body of so many bytes."""
    headers = [(b"content-type", content_type.encode("latin-1")), (b"content-length", str(num_bytes).encode())]
    return {
        "type": "http",
        # of 2.3, a closed connection is told by `receive` alone; later ones want `send` to fail
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
    }


async def messages_of(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
    """What an application sends in answer to a request: the messages that are there, whenever there are any.

    Closing this before its end is to the application as a client that leaves.

    Raises:
        Exception: as the application does.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    async def answer() -> None:
        try:
            await app(scope, receive_of(body, gone), send)
        finally:
            sent.put_nowait(None)

    answering = asyncio.create_task(answer())
    try:
        is_over = False
        while not is_over:
            ready = [await sent.get()]
            while not sent.empty():
                ready.append(sent.get_nowait())
            is_over = ready[-1] is None
            messages = [message for message in ready if message is not None]
            if messages:
                yield messages
        await answering
    finally:
        gone.set()
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
