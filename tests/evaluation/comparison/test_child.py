"""A cell's process does not outlive the one that started it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from metier.evaluation.comparison.cells import LOG
from metier.evaluation.comparison.child import start_child, stop_child, why_failed

RUNNER = """
import os, sys, time
from metier.evaluation.comparison.child import ENDS_WITH_STARTER, end_with_starter
assert ENDS_WITH_STARTER in sys.argv
end_with_starter()
print(os.getpid(), os.environ["OMP_NUM_THREADS"], flush=True)
time.sleep(60)
"""
STARTER = """
import sys, time
from pathlib import Path
from metier.evaluation.comparison.child import start_child
start_child(Path(sys.argv[1]), {}, num_threads=3, runner="made_up_runner")
time.sleep(60)
"""
SECONDS = 20  # a loaded machine is no failing test


def eventually(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_process_ends_when_its_starter_is_killed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "made_up_runner.py").write_text(RUNNER)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    folder = tmp_path / "cell"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(folder)])
    try:
        eventually(lambda: (folder / LOG).exists() and (folder / LOG).read_text().endswith("\n"))
        pid, num_threads = (folder / LOG).read_text().split()
        assert num_threads == "3"
        assert is_there(int(pid))
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    eventually(lambda: not is_there(int(pid)))


def test_why_a_process_failed_is_said(tmp_path: Path) -> None:
    process = start_child(tmp_path, {}, num_threads=1, runner="no_such_runner")
    process.wait()
    assert why_failed(tmp_path, process.returncode) == "exit code 1"
    stop_child(process)
    assert "No module named no_such_runner" in (tmp_path / LOG).read_text()
    assert why_failed(tmp_path, -9) == "killed"
    # it ended well and has left nothing
    assert why_failed(tmp_path, 0) == "exit code 0"
