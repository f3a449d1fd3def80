"""A process is killed: the job fails in words or goes on by itself, and nothing behind a checkpoint is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed.killing import kill, launched, wait_until, workers
from distributed.launch import command, losses, metier_command

NO_HANG_SECONDS = 60
LOSS = 1e-6
"""Relative; the order of float32 sums."""


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_process_ends_the_job_in_words(tmp_path: Path, run_file: Callable[..., Path]) -> None:
    log = tmp_path / "log"
    run = launched(run_file("run", max_steps=200, save_steps=5), 2, log, restarts=0)
    kept = tmp_path / "run" / "checkpoints" / "checkpoint-5" / "complete"
    assert wait_until(kept.exists, run)
    killed = time.monotonic()
    kill(workers(run.pid)[1])
    assert run.wait(timeout=NO_HANG_SECONDS) != 0
    assert time.monotonic() - killed < NO_HANG_SECONDS
    said = log.read_text()
    assert "process 0 of 2: another process of the run is gone" in said
    assert "goes on from" in said
    assert kept.exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_goes_on_from_the_last_checkpoint(
    options: tuple[str, ...], victim: int, tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    alone = command(metier_command("train", str(run_file("one", max_steps=20, save_steps=5))))
    assert alone.code == 0, alone.text
    log = tmp_path / "log"
    run = launched(run_file("run", max_steps=20, save_steps=5), 2, log, restarts=1, options=options)
    assert wait_until((tmp_path / "run" / "checkpoints" / "checkpoint-10" / "complete").exists, run)
    kill(workers(run.pid)[victim])
    assert run.wait(timeout=240) == 0, log.read_text()
    assert "Resuming from" in log.read_text()
    straight, again = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert list(straight) == list(again)
    for step, line in straight.items():
        assert again[step]["loss"] == pytest.approx(line["loss"], rel=LOSS)
