"""The deltas of one replica: in service as requests bring them along, resident as Ray Serve's book says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from metier.errors import DeltaError, UnknownDeltaError
from metier.serving.contract import DeltaStatus
from metier.serving.http.metrics import Metrics
from metier.serving.on_ray.names import NamedDelta
from metier.serving.on_ray.placement import Placement, num_that_fit
from serving.on_ray.placing_engine import PlacingEngine, multiplex

LAW, CODE, POEMS = (NamedDelta(name, Path("/deltas") / name, 1) for name in ("law", "code", "poems"))


class World:
    def __init__(self, *deltas: NamedDelta, budget_bytes: int = 20) -> None:
        self.engine = PlacingEngine({delta.name: delta.folder for delta in deltas})
        self.metrics = Metrics(self.engine, "base")
        self.placement = Placement(self.engine, self.metrics, multiplex, budget_bytes=budget_bytes, deltas=deltas)
        self.engine.log.clear()

    def arrivals(self) -> dict[str, float]:
        families = text_string_to_metric_families(self.metrics.text().decode())
        samples = [sample for family in families for sample in family.samples]
        return {
            f"{sample.labels['model']} {sample.labels['tier']}": sample.value
            for sample in samples
            if sample.name == "metier_delta_requests_total"
        }


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(body(), timeout=20)

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("sizes", "budget", "num"),
    [([10, 10, 10], 25, 2), ([5, 30, 5], 39, 2), ([5, 30, 5], 40, 3), ([50], 10, 1), ([], 9, 1)],
)
def test_as_many_are_held_as_fit_whichever_they_are(sizes: list[int], budget: int, num: int) -> None:
    assert num_that_fit(sizes, budget) == num


def test_a_replica_starts_with_none_on_its_accelerator() -> None:
    engine = PlacingEngine({"law": LAW.folder}, tiers={"law": "accelerator"})
    Placement(engine, Metrics(engine, "base"), multiplex, budget_bytes=20, deltas=[LAW])
    assert engine.tiers["law"] == "disk"


def test_what_is_asked_for_is_brought_up_and_what_falls_out_of_the_book_is_sent_down() -> None:
    world = World(LAW, CODE, POEMS)

    async def body() -> None:
        for delta in (LAW, CODE, LAW, POEMS, LAW):
            await world.placement.make_ready(delta)

    run(body)
    assert world.engine.log == ["bring law", "bring code", "down code", "bring poems"]
    assert world.arrivals() == {"law disk": 1, "law accelerator": 2, "code disk": 1, "poems disk": 1}


def test_a_delta_that_the_replica_does_not_know_comes_with_its_request() -> None:
    world = World()

    async def body() -> None:
        await asyncio.gather(*(world.placement.make_ready(LAW) for _ in range(3)))

    run(body)
    assert world.engine.log == ["load law law", "bring law"]


def test_a_later_delta_takes_the_place_of_a_former_one_of_its_name() -> None:
    world = World(LAW)
    later = replace(LAW, folder=Path("/deltas/law-2"), since_ns=2)

    async def body() -> None:
        await world.placement.make_ready(LAW)
        await world.placement.make_ready(later)

    run(body)
    assert world.engine.log[1:3] == ["unload law", "load law law-2"]


def test_a_request_that_comes_after_its_delta_was_forgotten_is_refused() -> None:
    world = World(LAW)

    async def body() -> None:
        await world.placement.forget(LAW)
        with pytest.raises(UnknownDeltaError, match="delta 'law': it has just been taken out of service"):
            await world.placement.make_ready(LAW)
        await world.placement.make_ready(replace(LAW, since_ns=2))

    run(body)
    assert world.engine.log == ["unload law", "load law law", "bring law"]


def test_while_a_delta_is_going_its_requests_are_refused_at_once_and_later_ones_wait() -> None:
    world = World(LAW)

    async def body() -> None:
        world.engine.may_unload.clear()
        leaving = asyncio.create_task(world.placement.forget(LAW))
        await asyncio.sleep(0)
        with pytest.raises(UnknownDeltaError):
            await asyncio.wait_for(world.placement.make_ready(LAW), timeout=1)
        later = asyncio.create_task(world.placement.make_ready(replace(LAW, since_ns=2)))
        await asyncio.sleep(0.01)
        assert not later.done()
        world.engine.may_unload.set()
        await asyncio.gather(leaving, later)

    run(body)
    assert world.engine.log == ["unload law", "load law law", "bring law"]


def test_forgetting_what_is_not_there_or_has_come_anew_changes_nothing() -> None:
    world = World(replace(LAW, since_ns=2))

    async def body() -> None:
        await world.placement.forget(LAW)
        await world.placement.forget(CODE)
        await world.placement.make_ready(replace(LAW, since_ns=2))

    run(body)
    assert world.engine.log == ["bring law"]


def test_a_delta_that_cannot_be_loaded_is_tried_again() -> None:
    world = World()

    async def body() -> None:
        world.engine.load_error = DeltaError("truncated")
        with pytest.raises(DeltaError, match="truncated"):
            await world.placement.make_ready(LAW)
        world.engine.load_error = None
        await world.placement.make_ready(LAW)

    run(body)
    assert world.engine.log == ["load law law", "bring law"]


def test_a_client_that_leaves_does_not_end_what_others_wait_for() -> None:
    world = World(LAW)

    async def body() -> None:
        world.engine.may_bring.clear()
        leaving = asyncio.create_task(world.placement.make_ready(LAW))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(world.placement.make_ready(LAW))
        leaving.cancel()
        await asyncio.sleep(0.01)
        world.engine.may_bring.set()
        await waiting

    run(body)
    assert world.engine.log == ["bring law"]


def test_a_client_that_leaves_while_its_delta_is_loaded_leaves_it_in_service() -> None:
    class Slow(PlacingEngine):
        async def load_delta(self, name: str, folder: Path, *, is_pinned: bool = False) -> DeltaStatus:
            loading = asyncio.ensure_future(super().load_delta(name, folder, is_pinned=is_pinned))
            await asyncio.sleep(0.05)  # a load that has begun goes on
            return await asyncio.shield(loading)

    async def body() -> None:
        world = World()
        world.engine.__class__ = Slow
        leaving = asyncio.create_task(world.placement.make_ready(LAW))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.sleep(0.2)
        await world.placement.make_ready(LAW)
        await world.placement.forget(LAW)
        assert world.engine.deltas() == []

    run(body)


def test_a_late_request_for_a_former_delta_does_not_replace_the_newer_one() -> None:
    async def body() -> None:
        world, newer = World(), replace(LAW, folder=LAW.folder.with_name("law-2"), since_ns=LAW.since_ns + 1)
        await world.placement.make_ready(newer)
        with pytest.raises(UnknownDeltaError, match="a newer one has taken its name"):
            await world.placement.make_ready(LAW)
        assert [status.name for status in world.engine.deltas()] == ["law"]

    run(body)
