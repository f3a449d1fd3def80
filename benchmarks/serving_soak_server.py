"""The server's process of the soak: its start, what it takes each second, and its end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2

_START_SECONDS = 900
"""With much other work on the machine."""
_HARMLESS = "Token indices sequence length is longer"
"""transformers says so once of a prompt that is refused afterwards."""


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    resident_bytes: int
    anonymous_bytes: int
    num_threads: int
    num_files: int


class Server:
    """`metier serve` with a log of its own."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        self.samples: list[Sample] = []
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "metier", "serve", *arguments], stdout=file, stderr=subprocess.STDOUT
            )
        self._began = time.monotonic()
        self.address = self._wait_for_address()

    def _wait_for_address(self) -> str:
        while time.monotonic() - self._began < _START_SECONDS:
            found = re.search(r"Serving at (http://\S+?)(?: on Ray)?: base", self.log.read_text(errors="replace"))
            if found:
                return found[1]
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        self.kill()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    async def watch(self, began: float) -> None:
        """Take a sample each second, until cancelled."""
        while True:
            self.samples.append(self.sample(began))
            await asyncio.sleep(1)

    def sample(self, began: float) -> Sample:
        return sample_of(self._process.pid, began)

    def stop(self) -> None:
        """Tell it to, as an operator does."""
        self._process.send_signal(signal.SIGTERM)

    async def ended(self, *, seconds: float) -> int | None:
        """Its exit code; None where it goes on."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self._process.poll()

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def complaints(self) -> list[str]:
        """Lines of the log that no server should write."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [x for x in lines if re.search("traceback|error|exception|failed|never", x, re.I) and _HARMLESS not in x]


def sample_of(pid: int, began: float) -> Sample:
    """What a process takes now."""
    process = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    kib = {name: int(status[name].split()[0]) for name in ("VmRSS", "RssAnon")}
    return Sample(
        time.monotonic() - began,
        kib["VmRSS"] * 1024,
        kib["RssAnon"] * 1024,
        int(status["Threads"]),
        len(os.listdir(process / "fd")),
    )


async def gauges(http: httpx2.AsyncClient) -> dict[str, float]:
    """Those of /metrics, each by its name and labels."""
    text = (await http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^([^#\n]+) (\S+)$", text, re.M)}


def left_behind(found: dict[str, float]) -> dict[str, float]:
    """What is not as it has to be once nobody asks: requests that run, wait or have failed, and blocks of the cache."""
    watched = ("metier_running_requests", "metier_waiting_requests", "metier_delta_running", "metier_cache_used_ratio")
    failed = {name: value for name, value in found.items() if 'outcome="failed"' in name}
    return failed | {name: value for name, value in found.items() if name.startswith(watched) and value}
