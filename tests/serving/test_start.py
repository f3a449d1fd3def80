"""What a server refuses to start with, and what it starts with little of."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from metier.errors import ConfigError, CorruptDeltaError, ServingError
from metier.models.load import LoadedModel
from metier.serving.contract import SamplingSettings
from metier.serving.start import EngineSettings, start_engine
from serving.delta_folders import base_in, esft_in

SMALL = {"cache_tokens": 512, "max_batch_tokens": 64, "max_requests": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def base(folder: Path) -> LoadedModel:
    return base_in(folder / "base")


@pytest.mark.parametrize(
    "name",
    ["device_memory_bytes", "delta_memory_bytes", "cache_tokens", "max_batch_tokens", "max_requests", "max_waiting"],
)
def test_sizes_that_nothing_can_run_with_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got -1, expected at least"):
        EngineSettings(**{name: -1})


def test_a_start_that_fails_leaves_no_thread(base: LoadedModel, folder: Path) -> None:
    delta = esft_in(folder / "damaged", base)
    file = delta / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    before = threading.active_count()
    with pytest.raises(CorruptDeltaError):
        start_engine(str(folder / "base"), {"damaged": delta}, settings=EngineSettings(**SMALL))
    assert threading.active_count() == before


def test_without_memory_for_deltas_the_base_alone_is_served(base: LoadedModel, folder: Path) -> None:
    delta = esft_in(folder / "law", base)
    settings = EngineSettings(**SMALL, delta_memory_bytes=0)
    with pytest.raises(ServingError, match=r"where the accelerator has 0 for deltas"):
        start_engine(str(folder / "base"), {"law": delta}, settings=settings)
    engine = start_engine(str(folder / "base"), {}, settings=settings).engine

    async def body() -> None:
        with pytest.raises(ServingError, match=r"where the accelerator has 0 for deltas"):
            await engine.load_delta("law", delta)
        answer = engine.submit([5, 9], delta=None, settings=SamplingSettings(max_tokens=3, temperature=0))
        assert 1 <= len([token async for token in answer]) <= 3
        await engine.close(grace_seconds=0)

    asyncio.run(body())
