"""Ray Serve's autoscaling: a replica that starts later knows what was loaded before, and Ctrl-C ends all of it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from serving.on_ray.server_process import START_SECONDS, WAIT_SECONDS, ServerProcess

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCALING = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 0}
ASKED = {"prompt": "This package contains the", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    from metier import embedded

    shutil.copytree(embedded.delta_path("synopsis"), tmp_path / "shelf" / "spare" / "synopsis")
    scaling = [word for key, value in SCALING.items() for word in ("--autoscaling", f"{key}={value}")]
    sizes = ["--device-memory", "1500MiB", "--cache-tokens", 16384, "--replica-cpus", 1]
    options = ["--on", "ray", *scaling, "--allow-loading", "--delta-dir", tmp_path / "shelf", "--port", 0]
    server = ServerProcess(["--model", "embedded", "--dtype", "float32", *options, *sizes], tmp_path / "log")
    yield server
    server.kill()


def test_a_replica_that_starts_later_answers_for_what_was_loaded_before(server: ServerProcess) -> None:
    body = {"lora_name": "late", "lora_path": "spare/synopsis"}
    assert server.http.post("/v1/load_lora_adapter", json=body).status_code == 200
    expected = text_of(server, "late")
    assert expected != text_of(server, "embedded")
    (first,) = server.replicas()
    is_over, texts = threading.Event(), []

    def ask_on() -> None:
        while not is_over.is_set():
            texts.append(text_of(server, "late"))

    asking = [threading.Thread(target=ask_on) for _ in range(6)]
    for thread in asking:
        thread.start()
    try:
        server.wait_until(lambda: len(server.replicas()) == 2, "a second replica runs", START_SECONDS)
    finally:
        is_over.set()
        for thread in asking:
            thread.join()
    assert set(texts) == {expected}
    # it holds the delta, so that nobody has asked the other one for it
    os.kill(server.pid_of(first), signal.SIGKILL)
    server.wait_until(lambda: ask(server, "late").status_code == 200, "the other replica answers")
    assert first not in server.replicas()
    assert text_of(server, "late") == expected
    stop_as_a_terminal_does(server)


def ask(server: ServerProcess, name: str) -> httpx2.Response:
    return server.http.post("/v1/completions", json={"model": name, **ASKED})


def text_of(server: ServerProcess, name: str) -> str:
    response = ask(server, name)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def stop_as_a_terminal_does(server: ServerProcess) -> None:
    """Ctrl-C reaches the processes of the cluster too."""
    long = {"model": "late", "prompt": "The", "max_tokens": 300, "temperature": 2, "seed": 1, "stream": True}
    pids = list(server.descendants())
    with server.http.stream("POST", "/v1/completions", json=long) as response:
        lines = response.iter_lines()
        next(lines)
        os.killpg(server.process.pid, signal.SIGINT)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason": "length"' in rest[-2] or '"finish_reason": "stop"' in rest[-2]
    assert server.process.wait(timeout=WAIT_SECONDS) == 0
    server.wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "all processes have ended")
