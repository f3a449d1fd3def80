"""A short soak of a server in a process of its own; the long one is `benchmarks/serving_soak.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "serving_soak.py"


@pytest.mark.slow
def test_clients_that_ask_leave_misuse_and_load_find_nothing_wrong() -> None:
    options = ["--minutes", "0.3", "--clients", "8", "--questions", "4", "--no-report"]
    done = subprocess.run([sys.executable, str(SOAK), *options], capture_output=True, text=True, timeout=900)
    assert done.stdout.splitlines()[-1:] == ["Nothing wrong."], done.stdout[-5000:] + done.stderr[-5000:]
    assert done.returncode == 0
