"""Runs a reply's code and its tests in a process of their own, with limits on all that they can take.

What is limited: wall and CPU time, memory, the size of files, open files and processes; the environment is empty, the
working folder is a fresh one that is deleted, Python runs isolated (`-I`), and everything that was started is
killed at the end. Where Linux lets an ordinary user make namespaces, there is no network either.

It guards against mistakes, not against malice: files that the user can read and write stay so, and root is not
held to the limit on processes. Run code of a model that you do not trust in a container or a virtual machine.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from metier.errors import ConfigError, DataError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_POLL_SECONDS = 0.005
# numpy's threads would each reserve memory, and may not be started
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_NAMESPACES = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child=KILL", "--")


class Outcome(StrEnum):
    """What came of a reply's code."""

    passed = "passed"
    failed = "failed"
    """A test did not hold, something was raised, or the process ended by itself or at a limit."""
    unparsed = "unparsed"
    """The reply is no Python."""
    timed_out = "timed_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one reply and its tests may take."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    """Of address space, numpy's 200 MB included."""
    file_bytes: int = 1 << 20
    num_open_files: int = 64
    num_processes: int = 0
    """Beside the one that runs: neither processes nor threads. Root is not held to it."""

    def resources(self) -> dict[str, int]:
        """The limits that the process sets itself, by their names in the module `resource`."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.num_open_files,
            "RLIMIT_NPROC": self.num_processes,
            "RLIMIT_CORE": 0,
        }


DEFAULT_LIMITS = Limits()


def run_tests(reply: str, tests: str, *, setup: str = "", limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run `setup`, then a reply's code, then `tests` in the same module, in a limited process.

    A reply passes only if the last line of `tests` was reached and nothing was raised; ending the process early is
    no way past them. The module is not `__main__`.

    Raises:
        ConfigError: on a system without these limits (any but Linux).
        DataError: `setup` does not run or `tests` is no Python; then the task is broken, not the reply.
    """
    if sys.platform != "linux":
        raise ConfigError(
            f"code_tests: got the platform {sys.platform!r}, expected 'linux': elsewhere the memory and the processes "
            "of model-written code cannot be limited. Run it in a Linux container."
        )
    token = secrets.token_hex(8)
    job = {"token": token, "setup": setup, "reply": reply, "tests": tests, "limits": limits.resources()}
    with tempfile.TemporaryDirectory(prefix="metier-code-") as folder, tempfile.TemporaryFile() as given:
        # files, not pipes: what is left unread or is written without end blocks nobody
        given.write(json.dumps(job).encode())
        given.seek(0)
        with tempfile.TemporaryFile() as answer:
            is_timed_out = _run(given.fileno(), answer.fileno(), folder, limits.wall_seconds)
            answer.seek(0)
            said = answer.read(1 << 12).decode(errors="replace").split("\n")[0]
    outcome = said.removeprefix(f"{token} ") if said.startswith(f"{token} ") else ""
    if outcome.startswith("broken"):
        raise DataError(
            f"the record's test_setup does not run or its tests are no Python ({outcome.removeprefix('broken ')}): "
            f"got {tests[:80]!r}. Mend the record."
        )
    if outcome:
        return Outcome(outcome)
    return Outcome.timed_out if is_timed_out else Outcome.failed


def _run(given: int, answer: int, folder: str, wall_seconds: float) -> bool:
    """Start the child, wait for it, kill its group; whether it was still running."""
    process = subprocess.Popen(
        [*namespaces(), sys.executable, "-I", "-B", str(_CHILD)],
        stdin=given,
        stdout=answer,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=_ENVIRONMENT,
        start_new_session=True,
    )
    end = time.monotonic() + wall_seconds
    try:
        # WNOWAIT: until it is reaped its number cannot become another group's
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > end:
                return True
            time.sleep(_POLL_SECONDS)
        return False
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@functools.cache
def namespaces() -> tuple[str, ...]:
    """The beginning of a command that runs without a network, and whose descendants all end with it; or nothing.

    Containers and some distributions forbid that to ordinary users.
    """
    program = shutil.which("unshare")
    if program is None:
        return ()
    command = (program, *_NAMESPACES)
    done = subprocess.run([*command, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return command if done.returncode == 0 else ()
