"""Run a comparison's cells as there is room for them, wherever that is; a crash of one loses no other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

from metier.evaluation.comparison.cells import FAILURE, LOG, Cell, Cells
from metier.planning.spelling import duration

_POLL_SECONDS = 0.2
_LAST_LINES = 30


@dataclass(frozen=True, slots=True)
class End:
    """How a cell's run ended."""

    cell: Cell
    reason: str
    """Why it failed, in a few words; "" where its result is in its folder."""
    is_begun: bool = True
    """False where the time was up before there was room for it."""


class Place(Protocol):
    """Where cells run: it starts them, and leaves in a cell's folder what its run left."""

    def has_room(self) -> bool:
        """Whether another cell may be handed over."""

    def start(self, cells: Cells, cell: Cell, *, until: float | None) -> None:
        """Take a cell over; it is not begun after `until`, in seconds since the epoch."""

    def ended(self, seconds: float) -> list[End]:
        """Cells that ended since the last call; waits so long for one."""

    def stop(self) -> None:
        """End what runs."""


def run_cells(cells: Cells, place: Place, *, console: Console, minutes: float | None = None) -> None:
    """Run all that is pending, and what becomes known on the way.

    Args:
        cells: of the comparison.
        place: where they run.
        console: where each cell's end is told.
        minutes: after which no cell is begun any more.
    """
    until, running = None if minutes is None else time.time() + 60 * minutes, set[Cell]()
    begun, num_ended = time.monotonic(), 0
    try:
        while True:
            is_over = until is not None and time.time() >= until
            for cell in cells.pending():
                if is_over or not place.has_room():
                    break
                if cell not in running:
                    place.start(cells, cell, until=until)
                    running.add(cell)
            if not running:
                return
            for end in place.ended(_POLL_SECONDS):
                running.remove(end.cell)
                if end.is_begun:
                    num_ended += 1
                    _tell(cells, end, console, (time.monotonic() - begun) / num_ended)
    finally:
        place.stop()


def _tell(cells: Cells, end: End, console: Console, seconds_each: float) -> None:
    """Say how a cell ended, and keep why where it failed; cells that end `seconds_each` apart take so long in all."""
    cell, folder = end.cell, cells.folder(end.cell)
    num_done = sum(cells.result(one) is not None for one in cells.known())
    left = cells.num_needed() - num_done - len(cells.failed())
    place = f"{num_done} of {cells.num_needed()}"
    then = f"; about {duration(left * seconds_each)} to go" if left else ""
    if not end.reason:
        result = cells.result(cell)
        assert result is not None, "it is there"
        console.print(
            f"{place}  {cell}: {result['test']['score']:.2f} in {result['seconds']:.0f} s{then}", highlight=False
        )
        return
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    (folder / FAILURE).write_text("\n".join([end.reason, *lines]), encoding="utf-8")
    console.print(f"{place}  {cell}: failed ({end.reason}); see {log}", style="red", highlight=False)
