"""README's section on serving, run as it stands: its command starts the server, and curl and Python ask it.

Where port 8000 is taken, another one stands in its place in all three.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from documented_commands import blocks

README = Path(__file__).parents[2] / "README.md"
PORT = 8000
START_SECONDS = 180
"""A machine with other work takes ten times as long as one without."""
ANSWER_SECONDS = 120


def test_the_commands_are_answered_by_the_base_and_by_each_delta(tmp_path: Path) -> None:
    # one test, since each start takes seconds
    port, environment = free_port(), of_this_environment()
    section = README.read_text(encoding="utf-8").split("\n## Serving\n")[1].split("\n## ")[0]
    command, curl = blocks(section, "bash")
    (code,) = blocks(section, "python")
    with served(command if port == PORT else f"{command.strip()} --port {port}", port, environment, tmp_path):
        check_client(code.replace(f":{PORT}/", f":{port}/"), environment)
        if shutil.which("curl") is not None:
            check_curl(curl.replace(f":{PORT}/", f":{port}/"), environment)
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed; all but its command was run")


def check_client(code: str, environment: dict[str, str]) -> None:
    lines = run([sys.executable, "-c", code], environment).splitlines()
    answers = dict(line.split(": ", 1) for line in lines)
    assert list(answers) == ["embedded", "synopsis", "translate"]
    assert len(set(answers.values())) == 3, answers
    assert all(answers.values()), answers


def check_curl(command: str, environment: dict[str, str]) -> None:
    answers = {}
    for model in ("translate", "embedded", "synopsis"):
        answer = json.loads(run(["bash", "-c", command.replace('"translate"', f'"{model}"')], environment))
        assert answer["model"] == model
        answers[model] = answer["choices"][0]["message"]["content"]
    assert len(set(answers.values())) == 3, answers
    # Slovak for what the prompt begins with: This package contains
    assert answers["translate"].startswith("Tento balík obsahuje")


@contextmanager
def served(command: str, port: int, environment: dict[str, str], folder: Path) -> Iterator[None]:
    """A server by that command, until a SIGTERM, after which it has to end as it should."""
    log = folder / "server.log"
    with log.open("wb") as out:
        # the shell gives its place to the server, so that the signal reaches that
        process = subprocess.Popen(["bash", "-c", f"exec {command}"], stdout=out, stderr=out, env=environment)
    try:
        wait_until_healthy(process, port, log)
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    # one client: to make one takes as long as it waits between two looks
    with httpx2.Client(trust_env=False) as client:
        while time.monotonic() < deadline:
            assert process.poll() is None, f"the server ended by itself:\n{log.read_text()}"
            try:
                if client.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
    raise AssertionError(f"no answer within {START_SECONDS} s:\n{log.read_text()}")


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    for wanted in (PORT, 0):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            return int(free.getsockname()[1])
    raise AssertionError("no port is free")


def of_this_environment() -> dict[str, str]:
    """In which `metier` is the one that is tested, no request goes by a proxy, and no key is asked for."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment.pop("METIER_API_KEY", None)
    return environment
