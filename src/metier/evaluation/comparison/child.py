"""A cell's own process, on whatever machine: how it is started, and how one sees from outside what became of it.

A process of its own, so that the peak of its memory is the cell's, and a crash is no other's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metier.evaluation.comparison.cells import LOG, RESULT, SPEC

RUNNER = "metier.training.cell"
"""The module that runs one; it stands above this room, so it is started and not imported."""
ENDS_WITH_STARTER = "--ends-with-starter"
"""Has the process end when its standard input does: when the one that started it is gone, killed or not."""


def start_child(
    folder: Path, spec: Mapping[str, Any], *, num_threads: int, runner: str = RUNNER, cwd: str | Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a cell's process; what it says goes to the folder's log.

    Args:
        folder: the cell's, which is made if it is missing.
        spec: what to run, as `Cells.spec` says it, and `profiles`, the folder of the tasks' profiles.
        num_threads: that it computes with.
        runner: the module that runs it.
        cwd: where its relative paths count from; the starter's if not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPEC).write_text(json.dumps(spec, indent=1), encoding="utf-8")
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", runner, str(folder), ENDS_WITH_STARTER],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
            cwd=cwd,
        )


def why_failed(folder: Path, code: int) -> str:
    """In a few words; "" where the process ended well and left its result."""
    if code == 0 and (folder / RESULT).exists():
        return ""
    return "killed" if code < 0 else f"exit code {code}"


def stop_child(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that may have ended already, and let go of it."""
    process.kill()
    process.wait()
    assert process.stdin is not None, "it is a pipe"
    process.stdin.close()


def end_with_starter() -> None:
    """End this process when its standard input ends."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
