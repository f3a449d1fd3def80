"""`metier serve` in a process of its own, on Ray or not, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import openai

START_SECONDS = 600
"""A machine with other work takes ten times as long as one without."""
ATTEMPTS = 3
WAIT_SECONDS = 180
ENGINE = "ray::ServeReplica:metier:Engine"
INGRESS = "ray::ServeReplica:metier:Ingress"


class ServerProcess:
    def __init__(self, arguments: Sequence[object], log: Path, *, command: str | None = None) -> None:
        """Args:
        arguments: of `metier serve`.
        log: what it prints.
        command: a shell's, in place of that.
        """
        self.log = log
        words = ["bash", "-c", f'exec {command} "$@"', "bash"] if command else [sys.executable, "-m", "metier", "serve"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
        environment.pop("METIER_API_KEY", None)
        for _ in range(ATTEMPTS):
            with log.open("wb") as out:
                self.process = subprocess.Popen(
                    [*words, *map(str, arguments)], stdout=out, stderr=out, env=environment, start_new_session=True
                )
            try:
                address = self._started()
            except BaseException:
                self.kill()
                raise
            if address is not None:
                break
        assert address is not None, self.text()
        self.address = address
        self.http = httpx2.Client(base_url=self.address, timeout=WAIT_SECONDS, trust_env=False)
        self.openai = openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS, http_client=None
        )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def _started(self) -> str | None:
        """Its address; None where Ray did not start in the time that it gives itself."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            found = re.search(r"Serving at (http://\S+?)(?: on Ray)?: base", self.text())
            if found:
                return found[1]
            if self.process.poll() is not None and "Ray did not start on this machine" in self.text():
                return None
            assert self.process.poll() is None, f"it ended by itself:\n{self.text()}"
            time.sleep(0.1)
        raise AssertionError(f"it did not start within {START_SECONDS} s:\n{self.text()}")

    def pids(self, title: str) -> list[int]:
        """Of its processes of that title."""
        return [pid for pid, of_it in self.descendants().items() if of_it.startswith(title)]

    def pid_of(self, replica: str) -> int:
        """Of the process that has a replica's log open, which is called by the replica's id."""
        for pid in self.pids(ENGINE):
            files = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.exists()]
            if any(replica in file for file in files):
                return pid
        raise AssertionError(f"no process of {replica} among {self.pids(ENGINE)}")

    def descendants(self) -> dict[int, str]:
        table: dict[int, tuple[int, str]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                except OSError:
                    continue
                table[int(entry.name)] = parent, title
        found: dict[int, str] = {}
        parents = {self.process.pid}
        while parents:
            children = {pid: title for pid, (parent, title) in table.items() if parent in parents}
            found |= children
            parents = set(children)
        return found

    def replicas(self) -> set[str]:
        """Those that say their metrics."""
        return set(re.findall(r'metier_engine_up\{replica="(\w+)"\}', self.http.get("/metrics").text))

    def wait_until(self, holds: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.text()[-3000:]}"
            time.sleep(0.1)

    def stop(self) -> int:
        """As an operator does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=WAIT_SECONDS)

    def kill(self) -> None:
        """With all processes of its cluster."""
        pids = list(self.descendants())
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
