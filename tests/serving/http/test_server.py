"""The server as a process sees it: its address, and how signals end it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import httpx2
import pytest

from metier.errors import ServingError
from metier.serving.http.app import create_app
from metier.serving.http.server import bound_socket, run
from metier.serving.http.settings import HttpSettings
from serving.fake_engine import FakeEngine
from serving.http.serving_app import BASE, chat, wait_until
from serving.made_tokenizers import byte_level

CHAT = "/v1/chat/completions"


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run_with(engine: FakeEngine, visit: Callable[[str], None], *, grace_seconds: float) -> None:
    """Run the server in this thread, where signals arrive, while `visit` is in another and stops it in the end."""
    errors: list[BaseException] = []

    def visit_and_stop(address: str) -> None:
        try:
            visit(address)
        except BaseException as error:
            errors.append(error)
            engine.hold_after = None
            stop()

    def on_start(address: str) -> None:
        threading.Thread(target=visit_and_stop, args=(address,)).start()

    settings = HttpSettings(grace_seconds=grace_seconds)
    run(create_app(engine, engine.tokenizer, BASE, settings), bound_socket("127.0.0.1", 0), on_start)
    if errors:
        raise errors[0]


def test_a_signal_lets_running_answers_finish_and_refuses_new_ones() -> None:
    engine, texts = FakeEngine(byte_level(), hold_after=2), []

    def visit(address: str) -> None:
        with httpx2.stream("POST", address + CHAT, json=chat(stream=True)) as response:
            parts = response.iter_text()
            texts.append(next(parts))
            stop()
            wait_until(lambda: httpx2.get(address + "/health").status_code == 503)
            refused = httpx2.post(address + CHAT, json=chat())
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert httpx2.get(address + "/health").json()["status"] == "closing"
            engine.hold_after = None
            texts.extend(parts)

    run_with(engine, visit, grace_seconds=10)
    assert '"finish_reason": "stop"' in "".join(texts)
    assert "".join(texts).endswith("data: [DONE]\n\n")
    assert engine.grace_seconds == 10
    assert engine.is_closed


def test_after_the_grace_an_answer_that_is_not_done_ends_in_an_error() -> None:
    engine, texts = FakeEngine(byte_level(), hold_after=2), []

    def visit(address: str) -> None:
        with httpx2.stream("POST", address + CHAT, json=chat(stream=True)) as response:
            stop()
            texts.append("".join(response.iter_text()))

    run_with(engine, visit, grace_seconds=0.1)
    assert "The server is closing and could not finish this answer." in texts[0]
    assert '"code": "unavailable"' in texts[0]


def test_a_second_signal_does_not_wait_for_running_answers() -> None:
    engine, errors = FakeEngine(byte_level(), hold_after=2), []

    def visit(address: str) -> None:
        with httpx2.stream("POST", address + CHAT, json=chat(stream=True)) as response:
            stop()
            wait_until(lambda: httpx2.get(address + "/health").status_code == 503)
            stop()
            with pytest.raises(httpx2.RemoteProtocolError) as raised:
                response.read()
            errors.append(raised.value)

    run_with(engine, visit, grace_seconds=60)
    assert errors


def test_the_address_is_that_of_the_bound_port() -> None:
    addresses = []

    def visit(address: str) -> None:
        addresses.append(httpx2.get(address + "/health").status_code)
        stop()

    run_with(FakeEngine(byte_level()), visit, grace_seconds=1)
    assert addresses == [200]


def test_a_taken_port_is_refused_before_anything_is_loaded() -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ServingError, match=rf"127\.0\.0\.1:{port}: the server cannot listen there: .*\nGive another"
        ):
            bound_socket("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("no.such.host.invalid", 0)])
def test_an_address_that_is_none_is_refused(host: str, port: int) -> None:
    with pytest.raises(ServingError, match="the server cannot listen there"):
        bound_socket(host, port)
