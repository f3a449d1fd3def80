"""The ingress' application over replicas that are only objects: what it says when some of them fail. No cluster runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from metier.errors import CorruptDeltaError, MetierError
from metier.serving.contract import DeltaStatus, EngineStatus
from metier.serving.http.settings import HttpSettings
from metier.serving.on_ray.forwarded import Forwarded
from metier.serving.on_ray.names import NamedDelta, Names
from metier.serving.on_ray.replica_state import ReplicaState

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

LAW = NamedDelta("law", Path("/deltas/law"), 10**9)
BODY = {"model": "law", "prompt": "x"}


class FakeReplica:
    def __init__(self, name: str) -> None:
        self.name = name
        self.deltas: dict[str, NamedDelta] = {"law": LAW}
        self.load_error: MetierError | None = None
        self.death: Exception | None = None
        self.may_put = asyncio.Event()
        self.may_put.set()

    async def put(self, delta: NamedDelta) -> MetierError | None:
        await self.may_put.wait()
        if self.load_error is None:
            self.deltas[delta.name] = delta
        return self.load_error

    async def forget(self, delta: NamedDelta) -> None:
        if self.deltas.get(delta.name) == delta:
            del self.deltas[delta.name]

    async def state(self) -> ReplicaState:
        deltas = tuple(
            DeltaStatus(
                name=delta.name,
                folder=delta.folder,
                kind="esft",
                tier="accelerator" if self.name == "a" else "disk",
                num_bytes=10,
                is_pinned=False,
                num_running=1,
                created=5,
            )
            for delta in self.deltas.values()
        )
        engine = EngineStatus(
            is_alive=True,
            error=None,
            num_running=1,
            num_waiting=0,
            cache_used=0.5,
            delta_bytes={"accelerator": 10, "host": 0, "disk": 0},
        )
        return ReplicaState(
            replica=self.name, engine=engine, deltas=deltas, max_length=64, capacity=2, memory="", worst_difference=None
        )

    async def metrics(self) -> tuple[str, bytes]:
        return self.name, b"# TYPE metier_engine_up gauge\nmetier_engine_up 1.0\n"


class FakeHandle:
    """As a handle of Ray Serve's."""

    def __init__(self, *replicas: FakeReplica) -> None:
        self.replicas = list(replicas)
        self.asked: list[tuple[str, Forwarded]] = []
        self.answer: Callable[[], AsyncIterator[list[dict[str, Any]]]] = whole
        self.num_cancelled = 0

    def options(self, multiplexed_model_id: str | None = None, **_: Any) -> FakeHandle:
        self.model_id = self.model_id if multiplexed_model_id is None else multiplexed_model_id
        return self

    model_id = ""

    def remote(self, request: Forwarded) -> FakeAnswer:
        self.asked.append((self.model_id, request))
        return FakeAnswer(self, self.answer())

    def broadcast(self, method: str, *arguments: Any) -> FakeBroadcast:
        from ray.serve.exceptions import DeploymentUnavailableError

        if not self.replicas:
            raise DeploymentUnavailableError("Engine")
        return FakeBroadcast([(replica, method, arguments) for replica in self.replicas])


class FakeAnswer:
    def __init__(self, handle: FakeHandle, messages: AsyncIterator[list[dict[str, Any]]]) -> None:
        self._handle, self._messages = handle, messages

    def __aiter__(self) -> AsyncIterator[list[dict[str, Any]]]:
        return self._messages

    def cancel(self) -> None:
        self._handle.num_cancelled += 1


class FakeBroadcast:
    def __init__(self, calls: list[tuple[FakeReplica, str, tuple[Any, ...]]]) -> None:
        self._calls = calls

    async def results_async(self, *, timeout_s: float | None, return_exceptions: bool) -> list[Any]:
        async def call(replica: FakeReplica, method: str, arguments: tuple[Any, ...]) -> Any:
            if replica.death is not None:
                raise replica.death
            return await getattr(replica, method)(*arguments)

        calls = [call(*each) for each in self._calls]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=return_exceptions), timeout_s)


def start_of(content_type: str, status: int = 200) -> dict[str, Any]:
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", content_type.encode())],
    }


def body_of(text: str, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


async def whole() -> AsyncIterator[list[dict[str, Any]]]:
    yield [start_of("application/json"), body_of('{"ok": true}', more=False)]


class World:
    """Two replicas behind an application, asked in this process."""

    def __init__(self, *, num_replicas: int = 2, **settings: Any) -> None:
        from metier.serving.on_ray.front_app import create_front_app
        from metier.serving.on_ray.ray_front import RayFront
        from metier.serving.on_ray.replicas import Replicas

        self.replicas = [FakeReplica(name) for name in "ab"[:num_replicas]]
        self.handle = FakeHandle(*self.replicas)
        self.names = Names([LAW])
        self.kept: list[list[str]] = []
        self.keep_error: MetierError | None = None
        settings = {"allows_loading": True, "delta_dirs": (Path("/"),), **settings}
        engine = Replicas(self.handle, self.names, self._keep)
        self.front = RayFront("base", HttpSettings(**settings), engine)
        app = create_front_app(self.front, self.names, self.handle)
        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost")

    async def _keep(self, deltas: Sequence[NamedDelta]) -> None:
        if self.keep_error is not None:
            raise self.keep_error
        self.kept.append([delta.name for delta in deltas])

    async def load(self, folder: Path, **fields: Any) -> httpx2.Response:
        return await self.http.post(
            "/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(folder), **fields}
        )

    async def ask(self, **fields: Any) -> httpx2.Response:
        return await self.http.post("/v1/completions", json={**BODY, **fields})


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def whole_body() -> None:
        await asyncio.wait_for(body(), timeout=30)

    asyncio.run(whole_body())


def test_a_request_goes_on_with_its_delta_and_comes_back_as_it_is() -> None:
    async def body() -> None:
        world = World(api_key="secret")
        answer = await world.http.post("/v1/completions", json=BODY, headers={"Authorization": "Bearer secret"})
        assert (answer.status_code, answer.json()) == (200, {"ok": True})
        ((model_id, request),) = world.handle.asked
        assert (model_id, request.delta, request.path) == ("law", LAW, "/v1/completions")
        assert "secret" not in repr(request)
        assert world.front.num_forwarded == 0
        assert (await world.ask()).status_code == 401

    run(body)


@pytest.mark.parametrize("model", ["base", 3])
def test_the_base_and_what_is_no_model_go_to_any_replica(model: Any) -> None:
    async def body() -> None:
        world = World()
        await world.ask(model=model)
        assert [(model_id, request.delta) for model_id, request in world.handle.asked] == [("", None)]

    run(body)


def test_an_unknown_model_goes_to_none() -> None:
    async def body() -> None:
        world = World()
        answer = await world.ask(model="lax")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert answer.json()["error"]["message"].startswith("model: got 'lax', expected one of base, law.")
        assert world.handle.asked == []

    run(body)


def test_a_replica_that_dies_before_it_answers_is_told_as_unavailable() -> None:
    async def dying() -> AsyncIterator[list[dict[str, Any]]]:
        raise ray.exceptions.ActorDiedError
        yield []

    async def body() -> None:
        world = World()
        world.handle.answer = dying
        answer = await world.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert "Ray Serve starts another" in answer.json()["error"]["message"]
        assert world.handle.num_cancelled == 1
        assert world.front.num_forwarded == 0

    run(body)


def test_a_stream_whose_replica_dies_ends_in_an_error_as_its_last_event() -> None:
    async def dying() -> AsyncIterator[list[dict[str, Any]]]:
        yield [start_of("text/event-stream; charset=utf-8"), body_of("data: {}\n\n", more=True)]
        raise ray.exceptions.ActorDiedError

    async def body() -> None:
        world = World()
        world.handle.answer = dying
        events = (await world.ask(stream=True)).text.strip().split("\n\n")
        assert events[0] == "data: {}"
        assert '"code": "unavailable"' in events[1]
        assert events[2] == "data: [DONE]"

    run(body)


def test_an_error_that_is_nobodys_is_not_shown() -> None:
    async def broken() -> AsyncIterator[list[dict[str, Any]]]:
        raise RuntimeError("secret")
        yield []

    async def body() -> None:
        world = World()
        world.handle.answer = broken
        answer = await world.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in answer.text

    run(body)


def test_a_closing_ingress_refuses_requests() -> None:
    async def body() -> None:
        world = World()
        world.front.is_closing = True
        assert (await world.ask()).status_code == 503
        assert (await world.http.get("/health")).json()["status"] == "closing"

    run(body)


def test_what_replicas_say_is_put_together() -> None:
    async def body() -> None:
        world = World()
        (base, law) = (await world.http.get("/v1/models")).json()["data"]
        assert (base["id"], base["max_model_len"]) == ("base", 64)
        assert law["metier"] == {"kind": "esft", "tier": "accelerator", "bytes": 10, "is_pinned": False, "running": 2}
        assert law["created"] == 1
        metrics = (await world.http.get("/metrics")).text
        assert 'metier_engine_up{replica="a"} 1.0\nmetier_engine_up{replica="b"} 1.0' in metrics

    run(body)


def test_replicas_that_are_gone_are_left_out_and_without_any_it_is_not_healthy() -> None:
    async def body() -> None:
        world = World()
        world.replicas[0].death = ray.exceptions.ActorDiedError()
        (_, law) = (await world.http.get("/v1/models")).json()["data"]
        assert (law["metier"]["tier"], law["metier"]["running"]) == ("disk", 1)
        assert (await world.http.get("/health")).status_code == 200
        world.handle.replicas = []
        health = await world.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert "no replica of the engine is running" in health.json()["reason"]
        assert (await world.http.get("/metrics")).status_code == 503

    run(body)


def test_a_delta_is_loaded_on_every_replica_and_kept_before_it_is_served(tmp_path: Path) -> None:
    async def body() -> None:
        world = World()
        world.replicas[1].may_put.clear()
        loading = asyncio.create_task(world.load(tmp_path))
        await asyncio.sleep(0.05)
        assert (await world.ask(model="new")).status_code == 404
        taken = await world.load(tmp_path)
        assert taken.json()["error"]["message"].startswith("delta 'new': the name is taken")
        world.replicas[1].may_put.set()
        assert (await loading).status_code == 200
        assert world.kept == [["law", "new"]]
        assert all("new" in replica.deltas for replica in world.replicas)
        assert (await world.ask(model="new")).status_code == 200
        assert (await world.http.post("/v1/unload_lora_adapter", json={"lora_name": "new"})).status_code == 200
        assert world.kept[-1] == ["law"]
        assert all("new" not in replica.deltas for replica in world.replicas)
        assert (await world.ask(model="new")).status_code == 404

    run(body)


def test_what_one_replica_cannot_load_is_served_by_none(tmp_path: Path) -> None:
    async def body() -> None:
        world = World()
        world.replicas[1].load_error = CorruptDeltaError("truncated")
        answer = await world.load(tmp_path)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "truncated")
        assert world.kept == []
        assert all("new" not in replica.deltas for replica in world.replicas)
        world.replicas[1].load_error = None
        world.replicas[0].death = ray.exceptions.ActorDiedError()
        assert (await world.load(tmp_path)).status_code == 503
        world.replicas[0].death = None
        assert (await world.load(tmp_path)).status_code == 200

    run(body)


def test_what_cannot_be_kept_is_not_served(tmp_path: Path) -> None:
    from metier.errors import EngineError

    async def body() -> None:
        world = World()
        world.keep_error = EngineError("it cannot be kept")
        assert (await world.load(tmp_path)).status_code == 503
        assert all("new" not in replica.deltas for replica in world.replicas)

    run(body)


def test_what_cannot_be_taken_off_the_list_stays_in_service() -> None:
    from metier.errors import EngineError

    async def body() -> None:
        world = World()
        world.keep_error = EngineError("it cannot be kept")
        with pytest.raises(EngineError, match="cannot be kept"):
            await world.front.engine.unload_delta("law")
        assert world.names.get("law") is not None
        assert all("law" in replica.deltas for replica in world.replicas)
        world.keep_error = None
        await world.front.engine.unload_delta("law")
        assert world.names.get("law") is None

    run(body)


def test_a_load_is_made_whole_though_its_client_leaves(tmp_path: Path) -> None:
    async def body() -> None:
        world = World()
        world.replicas[1].may_put.clear()
        loading = asyncio.create_task(world.front.engine.load_delta("new", tmp_path))
        await asyncio.sleep(0.01)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        world.replicas[1].may_put.set()
        while world.names.get("new") is None:
            await asyncio.sleep(0.001)
        assert world.kept == [["law", "new"]]

    run(body)


def test_none_can_be_pinned(tmp_path: Path) -> None:
    async def body() -> None:
        world = World()
        answer = await world.load(tmp_path, pinned=True)
        assert answer.status_code == 400
        assert "Ray Serve decides which replica holds which deltas" in answer.json()["error"]["message"]

    run(body)
