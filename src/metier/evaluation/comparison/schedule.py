"""Run a comparison's cells, each in a process of its own, so many at once; a crash of one loses no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from rich.console import Console

from metier.evaluation.comparison.cells import FAILURE, LOG, RESULT, SPEC, Cell, Cells

_RUNNER = "metier.training.cell"
"""The module that runs one; it stands above this room, so it is started and not imported."""
_LAST_LINES = 30


def run_cells(cells: Cells, *, console: Console, num_jobs: int = 1, minutes: float | None = None) -> None:
    """Run all that is pending, and what becomes known on the way.

    Args:
        cells: of the comparison.
        console: where each cell's end is told.
        num_jobs: processes at once; each gets its share of the machine's cores.
        minutes: after which no cell is begun any more.
    """
    started, running = time.monotonic(), dict[Cell, subprocess.Popen[bytes]]()
    num_threads = max(1, (os.cpu_count() or 1) // num_jobs)
    try:
        while True:
            for cell, process in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    _tell(cells, cell, process.returncode, console)
            is_over = minutes is not None and time.monotonic() - started > 60 * minutes
            waiting = deque(cell for cell in cells.pending() if cell not in running)
            while waiting and len(running) < num_jobs and not is_over:
                cell = waiting.popleft()
                running[cell] = _start(cells, cell, num_threads)
            if not running:
                return
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _start(cells: Cells, cell: Cell, num_threads: int) -> subprocess.Popen[bytes]:
    folder = cells.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    spec = {**cells.spec(cell), "profiles": str((cells.root / "profiles").resolve())}
    (folder / SPEC).write_text(json.dumps(spec, indent=1), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", _RUNNER, str(folder)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _tell(cells: Cells, cell: Cell, code: int, console: Console) -> None:
    """Say how a cell ended, and keep why where it failed."""
    folder = cells.folder(cell)
    num_done = sum(cells.result(one) is not None for one in cells.known())
    place = f"{num_done} of {cells.num_needed()}"
    if code == 0 and (folder / RESULT).exists():
        result = cells.result(cell)
        assert result is not None, "it is there"
        console.print(f"{place}  {cell}: {result['test']['score']:.2f} in {result['seconds']:.0f} s", highlight=False)
        return
    reason = "killed" if code < 0 else f"exit code {code}"
    (folder / FAILURE).write_text(f"{reason}\n{_end_of(folder / LOG)}", encoding="utf-8")
    console.print(f"{place}  {cell}: failed ({reason}); see {folder / LOG}", style="red", highlight=False)


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LAST_LINES:])
