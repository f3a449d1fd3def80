"""What a server refuses to start with, and what it starts with little of."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

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


def test_deltas_are_pinned_from_the_start(base: LoadedModel, folder: Path) -> None:
    deltas = {name: esft_in(folder / f"pin-{name}", base) for name in ("law", "medicine")}
    settings = EngineSettings(**SMALL, pinned=("medicine",))
    engine = start_engine(str(folder / "base"), deltas, settings=settings).engine
    assert {status.name: status.is_pinned for status in engine.deltas()} == {"law": False, "medicine": True}
    asyncio.run(engine.close(grace_seconds=0))


def test_a_server_starts_where_transformers_counts_less_memory(
    base: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda _: 20_000_000)
    started = start_engine(str(folder / "base"), {})
    asyncio.run(started.engine.close(grace_seconds=0))
    assert 0 < started.budgets.cache_tokens < 64 * 4096
    with pytest.raises(ServingError, match="does not fit"):
        start_engine(str(folder / "base"), {}, settings=EngineSettings(cache_tokens=64 * 4096))


STARTED = """
import asyncio, os, sys, torch
from metier.memory.openmp import end_workers
from metier.serving.start import EngineSettings, start_engine

torch.set_num_threads(3)
torch.rand(1 << 20).mul_(2)  # as what is computed at the start may be too little
settings = EngineSettings(cache_tokens=512, max_batch_tokens=64, max_requests=8)
engine = start_engine(sys.argv[1], {}, settings=settings).engine
before = len(os.listdir("/proc/self/task"))
end_workers()
print(before - len(os.listdir("/proc/self/task")))
asyncio.run(engine.close(grace_seconds=0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux does")
@pytest.mark.usefixtures("base")
def test_a_started_server_has_no_workers_but_the_batch_s(folder: Path) -> None:
    command = [sys.executable, "-c", STARTED, str(folder / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]
