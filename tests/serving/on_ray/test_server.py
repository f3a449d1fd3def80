"""A server on a local Ray with two replicas, asked as one without Ray is; its answers have to be the same.

One server for all tests, since each start takes a minute. The last test ends it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from serving.on_ray.server_process import INGRESS, START_SECONDS, ServerProcess

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WHY = [{"role": "user", "content": "This package contains the documentation of a library."}]
NAMES = ["embedded", "synopsis", "translate", "again"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that deltas may be loaded from: those that ship, which are called by other names there."""
    from metier import embedded

    shelf = tmp_path_factory.mktemp("shelf")
    for name in ("synopsis", "translate"):
        shutil.copytree(embedded.delta_path(name), shelf / "spare" / f"{name}-copy")
    shutil.copytree(embedded.delta_path("synopsis"), shelf / "again")
    shutil.copytree(embedded.delta_path("synopsis"), shelf / "spare" / "damaged")
    tensors = shelf / "spare" / "damaged" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    return shelf


def arguments(shelf: Path) -> list[object]:
    named = ["synopsis=embedded:synopsis", "translate=embedded:translate"]
    deltas = [word for name in named for word in ("--delta", name)]
    # two of the three, whichever they are
    sizes = ["--device-memory", "1500MiB", "--delta-memory", 17_400_000, "--cache-tokens", 16384]
    return ["--model", "embedded", "--dtype", "float32", "--port", 0, "--delta-dir", shelf, *deltas, *sizes]


@pytest.fixture(scope="module")
def alone(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess([*arguments(shelf), "--no-self-test"], tmp_path_factory.mktemp("alone") / "log")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def server(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ["--on", "ray", "--replicas", 2, "--allow-loading", "--grace-seconds", 120]
    server = ServerProcess([*arguments(shelf), *options], tmp_path_factory.mktemp("ray") / "log")
    yield server
    server.kill()


def without_ids(values: dict[str, Any]) -> dict[str, Any]:
    """An answer without what is new each time."""
    return {key: value for key, value in values.items() if key not in ("id", "created")}


def test_it_says_what_each_replica_holds_and_nothing_that_ray_says(server: ServerProcess) -> None:
    lines = server.text().splitlines()
    assert lines[0].startswith("Memory of each replica (2): weights 0.07 GiB, KV cache of 16,384 tokens")
    assert lines[1] == "Each holds 2 of 3 deltas at once."
    assert lines[2].startswith("Self-test: each delta (3) says what its merged model says")
    assert lines[3] == f"Serving at {server.address} on Ray: base embedded; deltas: synopsis, translate, again."
    assert len(lines) == 4


def test_two_replicas_answer_as_one_server_alone_does(server: ServerProcess, alone: ServerProcess) -> None:
    bodies = [
        (path, {"model": name, "temperature": 0, "max_tokens": num, **prompt, **extra})
        for name in NAMES
        for path, prompt in ((CHAT, {"messages": WHY}), (TEXT, {"prompt": "The library of"}))
        for num, extra in (
            (24, {}),
            (12, {"temperature": 1, "seed": 3, "n": 3}),
            (16, {"stop": "a", "metier": {"experts": True}}),
        )
    ]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda asked: server.http.post(asked[0], json=asked[1]), bodies))
    for (path, body), response in zip(bodies, got, strict=True):
        expected = alone.http.post(path, json=body)
        assert response.status_code == expected.status_code == 200
        here, there = without_ids(response.json()), without_ids(expected.json())
        for values in (here, there):
            values.get("metier", {}).pop("seconds", None)
            values.get("metier", {}).pop("tokens_per_second", None)
            values["usage"].pop("prompt_tokens_details")
        if "metier" not in here:  # which experts count depends on what was cached
            assert here == there, body
        else:
            assert here["choices"] == there["choices"], body
    assert len(server.replicas()) == 2


def test_openais_client_streams_the_same(server: ServerProcess, alone: ServerProcess) -> None:
    def stream(client: openai.OpenAI, name: str) -> tuple[str, list[str | None], int]:
        chunks = list(
            client.chat.completions.create(
                model=name,
                messages=WHY,
                max_tokens=24,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert chunks[-1].usage is not None
        text = "".join(choice.delta.content or "" for choice in choices)
        return text, [choice.finish_reason for choice in choices][-1:], chunks[-1].usage.completion_tokens

    texts = set()
    for name in NAMES:
        got = stream(server.openai, name)
        assert got == stream(alone.openai, name)
        texts.add(got[0])
    assert len(texts) == 3  # two names stand for copies of one delta


def test_pieces_come_as_they_are_made(server: ServerProcess) -> None:
    body = {"model": "synopsis", "prompt": "The", "max_tokens": 300, "stream": True, "temperature": 1, "seed": 1}
    with server.http.stream("POST", TEXT, json=body) as response:
        times = [time.monotonic() for line in response.iter_lines() if line.startswith("data:")]
    assert times[-1] - times[0] > 0.2
    assert sum(after - before > 1e-4 for before, after in itertools.pairwise(times)) > 10


REFUSED = [
    ("POST", CHAT, {"json": {"model": "none", "messages": WHY}}),
    ("POST", CHAT, {"json": {"model": "synopsis", "messages": WHY, "temprature": 1}}),
    ("POST", CHAT, {"json": {"messages": WHY}}),
    ("POST", CHAT, {"json": {"model": 3, "messages": WHY}}),
    ("POST", CHAT, {"json": {"model": "synopsis", "messages": WHY, "max_tokens": 10**6}}),
    ("POST", CHAT, {"content": b"{", "headers": {"Content-Type": "application/json"}}),
    ("POST", CHAT, {"content": b'{"model": "synopsis"}', "headers": {"Content-Type": "text/plain"}}),
    ("POST", TEXT, {"json": {"model": "embedded", "prompt": "x" * (5 << 20)}}),
    ("GET", "/v1/models", {"headers": {"Host": "evil.example"}}),
    ("GET", "/v1/models/none", {}),
    ("GET", "/nothing", {}),
    ("DELETE", "/v1/models", {}),
]


@pytest.mark.parametrize(("method", "path", "request_of"), REFUSED)
def test_what_cannot_be_answered_is_refused_as_by_a_server_alone(
    server: ServerProcess, alone: ServerProcess, method: str, path: str, request_of: dict[str, Any]
) -> None:
    got, expected = (each.http.request(method, path, **request_of) for each in (server, alone))
    assert (got.status_code, got.json()) == (expected.status_code, expected.json())
    assert got.status_code >= 400


def test_openais_client_is_told_of_an_unknown_model(server: ServerProcess) -> None:
    with pytest.raises(
        openai.NotFoundError, match="got 'none', expected one of embedded, synopsis, translate"
    ) as raised:
        server.openai.chat.completions.create(model="none", messages=WHY)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_models_and_the_page_are_those_of_a_server_alone(server: ServerProcess, alone: ServerProcess) -> None:
    assert [model.id for model in server.openai.models.list()] == NAMES
    changing = ("tier", "running")

    def card(each: ServerProcess) -> dict[str, Any]:
        values: dict[str, Any] = each.http.get("/v1/models/translate").json()
        about = {key: value for key, value in values["metier"].items() if key not in changing}
        return {**{key: value for key, value in values.items() if key != "created"}, "metier": about}

    assert card(server) == card(alone)
    assert server.http.get("/").text == alone.http.get("/").text
    assert server.http.get("/health").json() == {"status": "ok"}


def test_the_page_asks_several_models_at_once(server: ServerProcess) -> None:
    body = {"id": "a" * 20, "path": CHAT, "models": NAMES, "body": {"messages": WHY, "max_tokens": 4, "stream": True}}
    text = server.http.post("/page/ask", json=body).text
    for name in NAMES:
        assert f'{{"model": "{name}", "status": 200}}' in text
    assert text.count("[DONE]") == len(NAMES)


def test_requests_go_to_the_replica_that_holds_their_delta(server: ServerProcess) -> None:
    def ask(name: str) -> None:
        body = {"model": name, "prompt": "The", "max_tokens": 1}
        assert server.http.post(TEXT, json=body).status_code == 200

    names = [name for name in NAMES if name != "embedded"]
    for name in names:
        ask(name)
    time.sleep(2)  # until the router has heard who holds what
    before = arrivals(server)
    for _ in range(10):
        for name in names:
            ask(name)
    held = {key: num - before.get(key, 0) for key, num in arrivals(server).items()}
    assert sum(held.values()) == 30
    # each is held by one replica, and answered there
    assert {tier for (_, _, tier), num in held.items() if num} == {"accelerator"}


def arrivals(server: ServerProcess) -> dict[tuple[str, str, str], int]:
    """Requests for deltas by model, replica and tier."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return {
        (sample.labels["model"], sample.labels["replica"], sample.labels["tier"]): int(sample.value)
        for family in families
        for sample in family.samples
        if sample.name == "metier_delta_requests_total"
    }


def gauge(server: ServerProcess, name: str) -> float:
    """Over all replicas."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def test_a_client_that_leaves_ends_its_answers(server: ServerProcess) -> None:
    # so random that none of them ends by itself soon
    body = {"model": "synopsis", "prompt": "The", "max_tokens": 900, "stream": True, "temperature": 2, "n": 4}
    for _ in range(3):
        with server.http.stream("POST", TEXT, json=body) as response:
            lines = response.iter_lines()  # once nobody has it, the connection is closed
            next(lines)
            assert gauge(server, "metier_running_requests") >= 1
        server.wait_until(lambda: gauge(server, "metier_running_requests") == 0, "the answer was ended")
    left = {**body, "stream": False}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(server.address + TEXT, json=left, timeout=1.0, trust_env=False)
    server.wait_until(lambda: gauge(server, "metier_running_requests") == 0, "the answer was ended")


# loading


def load(server: ServerProcess, name: str, path: str, **fields: Any) -> httpx2.Response:
    return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def unload(server: ServerProcess, name: str) -> httpx2.Response:
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def answer(server: ServerProcess, name: str) -> str:
    body = {"model": name, "messages": WHY, "max_tokens": 24, "temperature": 0}
    response = server.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_delta_is_loaded_on_all_replicas_and_unloaded_again(server: ServerProcess) -> None:
    loaded = load(server, "fresh", "spare/translate-copy")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'fresh' added successfully.")
    assert [model.id for model in server.openai.models.list()] == [*NAMES, "fresh"]
    assert len({line for line in server.http.get("/metrics").text.splitlines() if 'bytes{model="fresh"' in line}) == 2
    assert answer(server, "fresh") == answer(server, "translate")
    taken = load(server, "fresh", "spare/synopsis-copy")
    assert taken.status_code == 400
    assert taken.json()["error"]["message"].startswith("delta 'fresh': the name is taken.")
    assert unload(server, "fresh").text == "Success: LoRA adapter 'fresh' removed successfully."
    gone = server.http.post(TEXT, json={"model": "fresh", "prompt": "x"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert unload(server, "fresh").status_code == 404
    load(server, "fresh", "spare/synopsis-copy")
    assert answer(server, "fresh") == answer(server, "synopsis")
    unload(server, "fresh")


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("spare/damaged", {}, "damaged"),
        ("spare/none", {}, "none"),
        ("../outside", {}, "expected a folder inside one that deltas may be read from"),
        ("spare/synopsis-copy", {"pinned": True}, "none can be pinned"),
    ],
)
def test_what_cannot_be_loaded_is_in_service_on_no_replica(
    server: ServerProcess, path: str, fields: dict[str, Any], message: str
) -> None:
    response = load(server, "bad", path, **fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert "Traceback" not in response.text
    assert [model.id for model in server.openai.models.list()] == NAMES
    assert 'model="bad"' not in server.http.get("/metrics").text


# what dies


def test_a_replica_that_is_killed_is_replaced_and_requests_go_on(server: ServerProcess) -> None:
    load(server, "late", "spare/translate-copy")
    expected, former = answer(server, "late"), server.replicas()
    holder = next(replica for (model, replica, _), num in arrivals(server).items() if model == "late" and num)
    statuses: list[int] = []
    is_over = threading.Event()

    def ask_on() -> None:
        while not is_over.is_set():
            for name in (*NAMES, "late"):
                body = {"model": name, "prompt": "The", "max_tokens": 4}
                statuses.append(server.http.post(TEXT, json=body).status_code)

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        os.kill(server.pid_of(holder), signal.SIGKILL)
        server.wait_until(lambda: len(server.replicas() - former) == 1, "another replica runs", START_SECONDS)
    finally:
        is_over.set()
        asking.join()
    # an answer that was under way there is lost; nothing else is
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) > len(statuses) / 2
    for _ in range(20):
        assert answer(server, "late") == expected
    unload(server, "late")


def test_an_ingress_that_is_killed_is_replaced_and_knows_what_was_loaded(server: ServerProcess) -> None:
    load(server, "kept", "spare/translate-copy")
    unload(server, "again")
    expected = answer(server, "kept")
    (pid,) = server.pids(INGRESS)
    os.kill(pid, signal.SIGKILL)
    server.wait_until(lambda: server.pids(INGRESS) not in ([], [pid]), "another ingress runs")
    server.wait_until(lambda: server.http.get("/health").status_code == 200, "the ingress answers")
    assert [model.id for model in server.openai.models.list()] == ["embedded", "synopsis", "translate", "kept"]
    assert answer(server, "kept") == expected
    unload(server, "kept")


def test_told_to_stop_it_lets_answers_finish_and_leaves_no_process(server: ServerProcess) -> None:
    body = {"model": "translate", "prompt": "The", "max_tokens": 400, "stream": True, "temperature": 1, "seed": 2}
    pids = list(server.descendants())
    with server.http.stream("POST", TEXT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: server.http.get("/health").status_code == 503, "it is closing")
        assert server.http.get("/health").json()["status"] == "closing"
        refused = server.http.post(TEXT, json={"model": "translate", "prompt": "The"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason": "stop"' in rest[-2] or '"finish_reason": "length"' in rest[-2]
    assert server.process.wait(timeout=120) == 0
    server.wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "all processes have ended")
    assert "Traceback" not in server.text()
