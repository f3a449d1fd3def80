"""Kill a process of a run at a moment, and let torchrun start it again or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from distributed.launch import SECONDS, environment


def workers(launcher: int) -> list[int]:
    """Processes that a launcher has started, by number."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = []
    for child in children:
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if b"metier" in words:
            found.append(int(child))
    return found


def launched(run: Path, processes: int, log: Path, *, restarts: int, options: tuple[str, ...] = ()) -> subprocess.Popen:
    """A run under torchrun, which may start it again so often; what it says goes into a file."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*launcher, f"--max-restarts={restarts}", "-m", "metier", "train", str(run), *options]
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *words], env=environment(), stdout=file, stderr=subprocess.STDOUT)


def wait_until(condition, launcher: subprocess.Popen, seconds: float = SECONDS) -> bool:
    """Whether it came true before the launcher ended.

    Raises:
        TimeoutError: neither happened in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if launcher.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError("neither true nor over in time")
        time.sleep(0.05)
    return True


def kill(victim: int) -> None:
    """At once, with nothing told to anybody."""
    os.kill(victim, signal.SIGKILL)
