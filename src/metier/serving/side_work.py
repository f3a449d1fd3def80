"""Threads that work beside the batch's steps, and the processors that steps leave them.

A parallel loop is done when the last of its threads is: where others take one of two processors for half of the time,
all loops take twice as long, and more where they take both. So while something is read, steps compute with fewer
threads, and nobody waits for anybody.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MOST_SECONDS = 0.05
"""That work beside steps waits for them to make room: they look once a layer, and a layer may take long."""


class SideWork:
    """Who works beside whom, in one process. `step` and `leave_room` are called in the threads that compute."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_beside = 0
        self._left: dict[int, int] = {}
        """By thread that is in a step: how many threads beside it it knows of."""
        self._own = threading.local()

    @contextmanager
    def beside(self, num_threads: int) -> Iterator[None]:
        """So many threads work beside the steps meanwhile; begins once running steps have made room."""
        with self._changed:
            self._num_beside += num_threads
            wanted = self._num_beside
            self._changed.wait_for(
                lambda: all(num >= min(wanted, self._num_beside) for num in self._left.values()), _MOST_SECONDS
            )
        try:
            yield
        finally:
            with self._changed:
                self._num_beside -= num_threads

    def begin_step(self) -> None:
        """A step begins in this thread."""
        if not hasattr(self._own, "num_threads"):
            self._own.num_threads = torch.get_num_threads()
        self._make_room()

    def leave_room(self) -> None:
        """Before each layer: from here on with as many threads fewer as work beside this one."""
        if self._left.get(threading.get_ident(), self._num_beside) != self._num_beside:
            self._make_room()

    def end_step(self) -> None:
        with self._changed:
            self._left.pop(threading.get_ident(), None)
            self._changed.notify_all()

    def end(self) -> None:
        """No more steps in this thread. Threads to come, too, take the number over that it had."""
        if hasattr(self._own, "num_threads"):
            torch.set_num_threads(self._own.num_threads)

    def _make_room(self) -> None:
        num_beside = self._num_beside
        num_threads = max(1, self._own.num_threads - num_beside)
        if num_threads != torch.get_num_threads():
            torch.set_num_threads(num_threads)
        with self._changed:
            self._left[threading.get_ident()] = num_beside
            self._changed.notify_all()


SIDE_WORK = SideWork()
"""Of this process."""


def stand_back(niceness: int) -> None:
    """The calling thread gets less of a processor that others want too: with 4 about 0.4 of their share, for good.

    Only Linux has priorities of threads.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
