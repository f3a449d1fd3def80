"""A run whose rows are on disk, killed by SIGKILL at random moments: the last checkpoint always loads."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from metier.config import RunConfig
from metier.memory import disk_cache
from metier.training.run import train

NUM_KILLS = 50
MEFT = {
    "method": "meft",
    "meft_r": 4096,
    "meft_num_key_experts": 128,
    "meft_store": "disk",
    "meft_state_dtype": "bfloat16",
    "meft_row_dtype": "bfloat16",
    "max_steps": 400,
    "save_steps": 2,
    "save_total_limit": 2,
}


SMALL_CACHE_BYTES = 300_000
"""Of rows, moments and gradients that are 2.6 MB a layer: so a step writes and reads the disk all the time."""
LEAST_STEPS, LEAST_LATE = 8, 15
"""Different checkpoints from which lives began, and kills of lives that had been training: else the test says little."""


def life(config: RunConfig) -> None:
    """One life of the run, in a process of its own, with little room for what is on disk."""
    torch.set_num_threads(1)
    disk_cache.BATCH_BYTES = 0
    disk_cache.disk_cache().most_bytes = SMALL_CACHE_BYTES
    with open(os.devnull, "w") as nowhere:
        train(config, console=Console(file=nowhere))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the lives have: the order of a product's sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wait_for_checkpoint(process: BaseProcess, checkpoints: Path) -> None:
    before, deadline = set(checkpoints.glob("*/complete")), time.monotonic() + 120
    while process.is_alive() and set(checkpoints.glob("*/complete")) <= before:
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_killed_fifty_times_ends_with_the_bits_of_one_that_was_not(
    configure: Callable[..., RunConfig], console: Console, one_thread: None
) -> None:
    straight = train(configure("straight", **MEFT), console=console)
    # forked from a process that has imported everything and started nothing
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["metier.training.run"])
    chance, num_kills, resume = random.Random(0), 0, None
    begun_from: list[str] = []
    num_late = 0
    while num_kills < NUM_KILLS:
        checkpoints = Path(configure("killed").output_dir) / "checkpoints"
        before = {marker.parent.name for marker in checkpoints.glob("*/complete")}
        begun_from.append(max(before, key=lambda name: int(name.rpartition("-")[2]), default="none"))
        config = configure("killed", resume_from_checkpoint=resume, **MEFT)
        process = processes.Process(target=life, args=(config,))
        process.start()
        if chance.random() < 0.5:
            process.join(chance.uniform(0.2, 2.0))  # while it begins, or soon after
        else:
            wait_for_checkpoint(process, Path(config.output_dir) / "checkpoints")
            process.join(chance.uniform(0.0, 0.3))
        assert process.exitcode is None or process.exitcode == 0, (
            "a life failed to begin from the last one's checkpoint"
        )
        if process.exitcode == 0:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        num_kills += 1
        num_late += {marker.parent.name for marker in checkpoints.glob("*/complete")} != before
        resume = "last" if (Path(config.output_dir) / "run.yaml").exists() else None
    assert num_kills == NUM_KILLS, "the run was over before it had been killed often enough"
    resumed = train(configure("killed", resume_from_checkpoint="last", **MEFT), console=console)
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight.folder, resumed.folder)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(set(begun_from)) >= LEAST_STEPS, f"the kills were to spread over the run: {begun_from}"
    assert num_late >= LEAST_LATE, f"{num_late} of {num_kills} kills met a run that had trained"
    logged = [json.loads(line) for line in (resumed.folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("row_bytes_to_disk", 0) > 0 for line in logged), "all had room in memory"
