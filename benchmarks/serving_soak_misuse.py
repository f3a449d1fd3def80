"""The soak's requests that must be refused, each with its status: malformed, oversized, of unknown models or fields."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
from serving_soak_asking import CHAT, TEXT, Soak
from serving_soak_world import BASE

MAX_BODY = 64 * 1024
_JSON = {"Content-Type": "application/json"}
_GOOD: dict[str, Any] = {"model": BASE, "prompt": "The", "max_tokens": 1, "temperature": 0}
_CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}

_BODIES: dict[str, list[tuple[str, bytes, int]]] = {
    "malformed JSON": [
        (CHAT, b"{", 400),
        (CHAT, b"", 400),
        (TEXT, b'{"model": "embedded", "prompt": ', 400),
        (TEXT, b"\xff\xfe\x00", 400),
        (TEXT, b"[" * 20_000, 400),
        (TEXT, b'{"a":' * 9_000 + b"1" + b"}" * 9_000, 400),
        (TEXT, b'{"model": "embedded", "prompt": "x", "seed": ' + b"9" * 5_000 + b"}", 400),
        (TEXT, b'{"model": "embedded", "prompt": "x", "temperature": NaN}', 400),
        (TEXT, b"null", 400),
        (CHAT, b'"text"', 400),
        ("/v1/load_lora_adapter", b"{]", 400),
        ("/v1/unload_lora_adapter", b"[]", 400),
        ("/page/ask", b"{", 400),
        ("/page/stop", b"7", 400),
    ],
    "half a UTF-16 pair": [
        (TEXT, b'{"model": "embedded", "prompt": "\\ud800"}', 400),
        (TEXT, b'{"model": "\\ud800", "prompt": "x"}', 404),
        (CHAT, b'{"model": "embedded", "messages": [{"role": "user", "content": "\\udfff"}]}', 400),
        ("/v1/load_lora_adapter", b'{"lora_name": "\\ud800", "lora_path": "\\ud800"}', 400),
        ("/v1/load_lora_adapter", b'{"lora_name": "a", "lora_path": "\\ud800"}', 400),
        ("/v1/unload_lora_adapter", b'{"lora_name": "\\ud800"}', 404),
    ],
}
_CHANGES: dict[str, list[tuple[dict[str, Any], int]]] = {
    "wrong type": [
        ({"prompt": 7}, 400),
        ({"prompt": []}, 400),
        ({"prompt": [[]]}, 400),
        ({"prompt": ["a", 1]}, 400),
        ({"prompt": [True]}, 400),
        ({"prompt": ""}, 200),
        ({"model": None}, 400),
        ({"model": ["embedded"]}, 400),
        ({"max_tokens": "7"}, 400),
        ({"max_tokens": 1.5}, 400),
        ({"temperature": "hot"}, 400),
        ({"stream": "yes"}, 400),
        ({"stop": 3}, 400),
        ({"stop": ["a", ""]}, 400),
        ({"logprobs": True}, 400),
        ({"stream_options": []}, 400),
        ({"metier": "experts"}, 400),
        ({"seed": 0.5}, 400),
    ],
    "out of range": [
        ({"max_tokens": 0}, 400),
        ({"max_tokens": -1}, 400),
        ({"temperature": -1}, 400),
        ({"temperature": 3}, 400),
        ({"top_p": 0}, 400),
        ({"n": 0}, 400),
        ({"n": 129}, 400),
        ({"n": 10**30}, 400),
        ({"logprobs": 21}, 400),
        ({"seed": 2**63}, 400),
        ({"stop": list("abcde")}, 400),
        ({"prompt": [-1]}, 400),
        ({"prompt": [10**30]}, 400),
        ({"prompt": [8192]}, 400),
    ],
    "unknown field": [({"temprature": 0}, 400), ({"\ud800": 1}, 400), ({"x" * 1000: 1}, 400)],
    "unsupported field": [({"top_k": 5}, 400), ({"logit_bias": {"1": 5}}, 400), ({"suffix": "x"}, 400)],
    "unknown model": [({"model": "nothing"}, 404), ({"model": ""}, 404), ({"model": "x" * 5000}, 404)],
    "oversized prompt": [
        ({"prompt": "word " * 3000}, 400),
        ({"prompt": [5] * 5000}, 400),
        ({"prompt": "word " * 200, "max_tokens": 1000}, 400),
        ({"max_tokens": 10**9}, 400),
    ],
}
_PATHS = [
    ("GET", "/nothing", 404),
    ("GET", TEXT, 405),
    ("POST", "/health", 405),
    ("DELETE", "/v1/models", 405),
    ("GET", "/v1/models/nothing", 404),
    ("GET", "/page/../../../etc/passwd", 404),
    ("GET", "/page/%2e%2e/%2e%2e/etc/passwd", 404),
    ("GET", "/v1/models", 200),
    ("GET", f"/v1/models/{BASE}", 200),
    ("GET", "/health", 200),
    ("GET", "/metrics", 200),
    ("GET", "/", 200),
]


async def misuse(soak: Soak, rng: random.Random) -> None:
    """One request at random that the server must refuse, or one that only looks."""
    act = rng.choice(
        [_send_body, _send_body, _send_change, _send_change, _send_change, _go, _send_large, _send_raw, _send_half]
    )
    await act(soak, rng)


async def _send(soak: Soak, kind: str, path: str, content: Any, status: int, **headers: str) -> None:
    response = await soak.http.post(path, content=content, headers={**_JSON, **headers})
    _expect(soak, kind, response, {status})


def _expect(soak: Soak, kind: str, response: httpx2.Response, statuses: set[int]) -> None:
    soak.record.count(kind, response.status_code)
    if response.status_code not in {*statuses, 429}:
        asked = response.request.content[:200] if response.request.method == "POST" else b""
        what = f"{response.request.method} {response.request.url.path} {asked!r}"
        soak.record.is_unexpected(f"{kind}: {what}: got {response.status_code}, not {statuses}: {response.text[:300]}")
    elif response.status_code >= 400:
        error = response.json()["error"]
        if set(error) != {"message", "type", "param", "code"} or "Traceback" in error["message"]:
            soak.record.is_unexpected(f"{kind}: not in OpenAI's form: {response.text[:300]}")


async def _send_body(soak: Soak, rng: random.Random) -> None:
    kind = rng.choice(list(_BODIES))
    path, body, status = rng.choice(_BODIES[kind])
    await _send(soak, kind, path, body, status)


async def _send_change(soak: Soak, rng: random.Random) -> None:
    kind = rng.choice(list(_CHANGES))
    change, status = rng.choice(_CHANGES[kind])
    await _send(soak, kind, TEXT, json.dumps({**_GOOD, **change}), status)
    if "prompt" not in change and "logprobs" not in change and "suffix" not in change:
        await _send(soak, kind, CHAT, json.dumps({**_CHAT, **change}), status)


async def _go(soak: Soak, rng: random.Random) -> None:
    method, path, status = rng.choice(_PATHS)
    response = await soak.http.request(method, path)
    kind = "looks on" if status == 200 else "wrong path or method"
    if status == 200:
        soak.record.count(kind, response.status_code)
        if response.status_code != 200:
            soak.record.is_unexpected(f"{kind}: {path}: {response.status_code}: {response.text[:300]}")
    else:
        _expect(soak, kind, response, {status})
    other = await soak.http.get("/v1/models", headers={"Host": "elsewhere.example"})
    _expect(soak, "another host's name", other, {403})


async def _send_large(soak: Soak, rng: random.Random) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield b" " * 8192

    path = rng.choice([CHAT, TEXT, "/v1/load_lora_adapter"])
    is_declared = rng.random() < 0.5
    kind = "oversized body, " + ("declared" if is_declared else "in pieces")
    try:
        await _send(soak, kind, path, b" " * (MAX_BODY + 1) if is_declared else pieces(), 413)
    except (httpx2.WriteError, httpx2.ReadError, httpx2.RemoteProtocolError):
        # the server does not read on; its refusal may be lost with the connection
        soak.record.count(kind, "cut off")


async def _send_raw(soak: Soak, rng: random.Random) -> None:
    """What is no HTTP, or only the beginning of it."""
    sent = rng.choice(
        [
            b"\x16\x03\x01\x02\x00",
            b"GET\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
            b"POST /v1/completions HTTP/9.9\r\nHost: localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ]
    )
    reply = await _exchange(soak, sent, seconds=0.5)
    status = reply.split(b" ")[1].decode() if reply.startswith(b"HTTP/1.") else "closed"
    soak.record.count("no HTTP", status)
    if status.startswith("5"):
        soak.record.is_unexpected(f"no HTTP: {sent[:60]!r}: {reply[:200]!r}")


async def _send_half(soak: Soak, rng: random.Random) -> None:
    """A request whose body never comes whole."""
    body = json.dumps(_CHAT).encode()
    lines = [
        f"POST {CHAT} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    head = "\r\n".join([*lines, "", ""]).encode()
    await _exchange(soak, head + body[: rng.randrange(len(body))], seconds=rng.random() / 5)
    soak.record.count("leaves, half a body", "left")


async def _exchange(soak: Soak, sent: bytes, *, seconds: float) -> bytes:
    address = urlsplit(soak.address)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(sent)
        await writer.drain()
        async with asyncio.timeout(seconds):
            return await reader.read(4096)
    except (TimeoutError, ConnectionError):
        return b""
    finally:
        writer.close()
