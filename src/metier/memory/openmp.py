"""OpenMP's workers, of which each thread that computes has its own: as many as are used, and no more.

GNU's OpenMP, which torch comes with, lets workers spin between two parallel loops as long as there are no more threads
than processors. Where there are more, workers sleep after each loop, and to wake them takes longer than many a loop
does: a step of a small model that is served took 2.2 times as long. Workers count as long as they are there, whether or
not the thread that they belong to computes any more.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path

import torch

_PAUSE_SOFT = 1  # omp.h


def end_workers() -> bool:
    """End the calling thread's workers; the next parallel loop that it runs makes new ones.

    Returns whether there is an OpenMP that can.
    """
    return any(library.omp_pause_resource_all(_PAUSE_SOFT) == 0 for library in _libraries())


@cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    """OpenMP, as torch comes with it or as the process has it."""
    shipped = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    found = []
    for name in (*shipped, None):
        try:
            library = ctypes.CDLL(None if name is None else str(name))
        except OSError:
            continue
        if hasattr(library, "omp_pause_resource_all"):
            found.append(library)
    return tuple(found)


class OneThreadEach:
    """Has threads compute without workers, and leaves their number to all other threads as it was.

    torch sets the number for the calling thread and for threads to come, so what it was is set again for the latter.
    """

    def __init__(self, num_threads: int) -> None:
        """Args:
        num_threads: how many call `enter`.
        """
        self._before = torch.get_num_threads()
        self._all_here = threading.Barrier(num_threads + 1)

    def enter(self) -> None:
        """In each of the threads, before it computes anything."""
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number over when it first asks, and keeps it
        self._all_here.wait()

    def wait(self) -> None:
        """In the thread that made them: until all have entered."""
        self._all_here.wait()
        torch.set_num_threads(self._before)
