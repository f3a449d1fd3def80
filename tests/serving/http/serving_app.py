"""The application over a fake engine: by uvicorn in a thread, or in process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from metier.serving.http.app import create_app
from metier.serving.http.server import bound_socket
from metier.serving.http.settings import HttpSettings
from serving.fake_engine import FakeEngine
from serving.made_tokenizers import byte_level

BASE = "org/base"


def client_of(engine: FakeEngine | None = None, **settings: Any) -> TestClient:
    """A client of an application in this process."""
    engine = engine or FakeEngine(byte_level())
    return TestClient(create_app(engine, engine.tokenizer, BASE, HttpSettings(**settings)))


@contextmanager
def served(engine: FakeEngine, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    bound = bound_socket("127.0.0.1", 0)
    settings = {"grace_seconds": 1.0, **settings}
    app = create_app(engine, engine.tokenizer, BASE, HttpSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


def chat(**fields: Any) -> dict[str, Any]:
    """A body of /v1/chat/completions."""
    return {"model": "law", "messages": [{"role": "user", "content": "Why?"}], **fields}
