"""This machine as the place where cells run: so many processes at once, each with its share of the cores."""

from __future__ import annotations

import os
import subprocess
import time

from metier.evaluation.comparison import child
from metier.evaluation.comparison.cells import Cell, Cells
from metier.evaluation.comparison.schedule import End


class Here:
    """A `Place`.

    Args:
        num_jobs: processes at once.
    """

    def __init__(self, num_jobs: int = 1) -> None:
        self._num_jobs = num_jobs
        self._num_threads = max(1, (os.cpu_count() or 1) // num_jobs)
        self._running: dict[Cell, tuple[Cells, subprocess.Popen[bytes]]] = {}

    def has_room(self) -> bool:
        return len(self._running) < self._num_jobs

    def start(self, cells: Cells, cell: Cell, *, until: float | None = None) -> None:
        spec = {**cells.spec(cell), "profiles": str((cells.root / "profiles").resolve())}
        process = child.start_child(cells.folder(cell), spec, num_threads=self._num_threads, runner=child.RUNNER)
        self._running[cell] = (cells, process)

    def ended(self, seconds: float) -> list[End]:
        over = [cell for cell, (_, process) in self._running.items() if process.poll() is not None]
        if not over:
            time.sleep(seconds)
        ends = []
        for cell in over:
            cells, process = self._running.pop(cell)
            child.stop_child(process)
            ends.append(End(cell, child.why_failed(cells.folder(cell), process.returncode)))
        return ends

    def stop(self) -> None:
        for _, process in self._running.values():
            child.stop_child(process)
        self._running.clear()
