"""Host, key, size and room; and that no error of the server's own reaches a client with its reason."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from metier.serving.http.settings import HttpSettings
from metier.serving.prompts import PromptEncoder
from serving.fake_engine import FakeEngine
from serving.http.serving_app import chat, client_of, served, wait_until
from serving.made_tokenizers import byte_level

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic s3cret", "s3cret", "Bearer s3cret2", "Bearer ä"]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/metrics", "/v1/nothing", "//v1/models"])
def test_without_the_key_nothing_is_answered(header: str | None, path: str) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    response = client_of(api_key="s3cret").request("POST" if path == CHAT else "GET", path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_key_requests_are_answered(scheme: str) -> None:
    response = client_of(api_key="s3cret").post(CHAT, json=chat(), headers={"Authorization": f"{scheme} s3cret"})
    assert response.status_code == 200


def test_health_needs_no_key() -> None:
    assert client_of(api_key="s3cret").get("/health").status_code == 200


def test_the_openai_client_sends_the_key(engine: FakeEngine) -> None:
    with served(FakeEngine(byte_level()), api_key="s3cret") as address:
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="s3cret", max_retries=0)
        assert [model.id for model in right.models.list()][1:] == ["law", "medicine"]
        with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
            right.with_options(api_key="wrong").models.list()


def test_the_key_is_not_shown_with_the_settings() -> None:
    assert "s3cret" not in repr(HttpSettings(api_key="s3cret"))


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:8000", 200), ("[::1]:80", 200), ("LOCALHOST", 200), ("evil.example:8000", 403), ("", 403)]
)  # fmt: skip
def test_a_local_server_answers_to_its_own_names_alone(host: str, status: int) -> None:
    app = client_of(allowed_hosts=("localhost", "127.0.0.1", "::1"))
    assert app.get("/health", headers={"Host": host}).status_code == status


def test_a_body_of_the_most_bytes_is_taken_and_one_more_is_not() -> None:
    app = client_of(max_body_bytes=500)
    body = b'{"model": "law", "prompt": "a", "user": ""}'
    fitting = body.replace(b'""', b'"' + b"x" * (500 - len(body)) + b'"')
    headers = {"Content-Type": "application/json"}
    assert app.post("/v1/completions", content=fitting, headers=headers).status_code == 200
    response = app.post("/v1/completions", content=fitting + b" ", headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


@pytest.fixture(scope="module")
def small_address() -> Iterator[str]:
    """A server that takes small and quick bodies only."""
    with served(FakeEngine(byte_level()), max_body_bytes=10_000, max_body_seconds=0.3) as url:
        yield url


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_huge_body_is_refused_while_it_comes(small_address: str, is_streamed: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 10_000

    body: Any = chunks() if is_streamed else b" " * 3_000_000
    response = httpx2.post(small_address + CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "The body has more than 10000 bytes, which is the most here."


def test_a_body_that_says_it_is_huge_is_refused_before_it_comes(small_address: str) -> None:
    host, port = small_address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10001\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_refused(small_address: str) -> None:
    host, port = small_address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_wrong_content_length_is_no_500(small_address: str) -> None:
    host, port = small_address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n{}")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_more_requests_than_may_be_answered_at_once_are_told_to_come_again() -> None:
    engine = FakeEngine(byte_level(), hold_after=0)
    with served(engine, max_concurrent=2) as address:
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(httpx2.post(address + CHAT, json=chat(), timeout=30).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(engine.generations) == 2)
        refused = httpx2.post(address + CHAT, json=chat(stream=True))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        assert httpx2.get(address + "/health").status_code == 200
        engine.hold_after = None
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]
        assert httpx2.post(address + CHAT, json=chat()).status_code == 200


def test_a_stream_holds_its_place_until_it_is_over() -> None:
    engine = FakeEngine(byte_level(), hold_after=1)
    with served(engine, max_concurrent=1) as address:
        with httpx2.stream("POST", address + CHAT, json=chat(stream=True)) as response:
            # the iterator is kept: the client closes the stream of one that is not
            parts = response.iter_bytes()
            next(parts)
            assert httpx2.post(address + CHAT, json=chat()).status_code == 429
            engine.hold_after = None
            assert b"[DONE]" in b"".join(parts)
        wait_until(lambda: httpx2.post(address + CHAT, json=chat()).status_code == 200)


def assert_bland(message: str, log: str) -> None:
    assert message.startswith("The server failed to answer. Its log has the reason under ")
    incident = message.rstrip(".").rsplit(" ", 1)[1]
    assert incident in log
    assert "secret of the engine" in log


@pytest.mark.parametrize("fault", ["raise_after", "fail_after"])
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_an_error_of_the_engine_is_logged_and_not_told(
    fault: str, num_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(byte_level(), **{fault: num_tokens})
    with caplog.at_level(logging.ERROR, "metier.serving"):
        response = client_of(engine).post(CHAT, json=chat())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert_bland(response.json()["error"]["message"], caplog.text)
    assert ("Traceback" in caplog.text) == (fault == "raise_after")


@pytest.mark.parametrize("fault", ["raise_after", "fail_after"])
def test_an_error_in_a_stream_is_its_last_event(
    client: openai.OpenAI, engine: FakeEngine, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    setattr(engine, fault, 2)
    texts: list[str] = []
    chunks = client.completions.create(model="law", prompt="a", stream=True)
    with caplog.at_level(logging.ERROR, "metier.serving"), pytest.raises(openai.APIError) as raised:
        texts.extend(chunk.choices[0].text for chunk in chunks)
    assert texts
    assert "Answer of law.".startswith("".join(texts))
    assert_bland(raised.value.message, caplog.text)
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["code"] == "internal_error"


def test_one_failed_answer_ends_all_of_its_request(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_after = 2
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="law", prompt="a", n=3)
    wait_until(lambda: engine.num_running == 0)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", CHAT])
def test_an_engine_that_raises_anywhere_is_a_bland_500(path: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(byte_level())

    def broken(*arguments: Any, **options: Any) -> Any:
        raise KeyError("secret of the engine")

    app = client_of(engine)
    engine.status = engine.deltas = engine.submit = broken  # type: ignore[method-assign]
    response = app.post(path, json=chat(model="org/base")) if path == CHAT else app.get(path)
    assert response.status_code == 500
    assert_bland(response.json()["error"]["message"], caplog.text)


@pytest.mark.parametrize("name", ["max_body_bytes", "max_concurrent", "max_n", "max_prompt_tokens", "max_body_seconds"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, expected more than 0"):
        HttpSettings(**{name: 0})  # type: ignore[arg-type]


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="api_key: got an empty text"):
        HttpSettings(api_key="")


def test_a_prompt_that_takes_long_does_not_hold_up_other_answers(
    engine: FakeEngine, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, is_encoding = threading.Event(), threading.Event()
    encode = PromptEncoder.encode_text

    def slowly(encoder: PromptEncoder, text: str) -> list[int]:
        is_encoding.set()
        assert may_go_on.wait(10)
        return encode(encoder, text)

    monkeypatch.setattr(PromptEncoder, "encode_text", slowly)
    slow = {"model": "law", "prompt": "a"}
    thread = threading.Thread(target=lambda: httpx2.post(address + "/v1/completions", json=slow))
    thread.start()
    assert is_encoding.wait(10)
    assert httpx2.post(address + CHAT, json=chat()).status_code == 200
    may_go_on.set()
    thread.join()
