"""One thread that does what it is given, in order, and otherwise what it finds to do itself; it sleeps between."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from metier.memory.openmp import OneThreadEach
from metier.serving.side_work import stand_back

Work = Callable[[], None]


class LoaderThread:
    """Begins at once, and ends by `close`.

    Args:
        changed: the lock of all that work is decided by; notified by `wake` and `do`.
        find_work: called with the lock, where nothing is given to do and something changed; None for nothing.
        on_death: called, without the lock, if work raises, which is a fault of the program: nothing is done any more.
        name: of the thread.
        niceness: as `stand_back`.
    """

    def __init__(
        self,
        changed: threading.Condition,
        *,
        find_work: Callable[[], Work | None],
        on_death: Callable[[BaseException], None],
        name: str = "delta-loader",
        niceness: int = 0,
    ) -> None:
        self._changed, self._find_work, self._on_death = changed, find_work, on_death
        self._niceness = niceness
        self._given: deque[Work] = deque()
        self._has_news = False
        self._is_closing = False
        # what it computes is little, and workers of its own would slow down those of the running requests
        self._one_thread = OneThreadEach(1)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._one_thread.wait()

    def do(self, work: Work) -> None:
        """Something to do, after what was given before."""
        with self._changed:
            self._given.append(work)
            self._changed.notify_all()

    def wake(self) -> None:
        """Something changed after which there may be work to find."""
        with self._changed:
            self._has_news = True
            self._changed.notify_all()

    def close(self) -> None:
        """End, once the work that was begun is done; what else was given is not done."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        if self._niceness:
            stand_back(self._niceness)
        self._one_thread.enter()
        try:
            while (work := self._next()) is not None:
                work()
        except BaseException as error:
            self._on_death(error)
            raise

    def _next(self) -> Work | None:
        with self._changed:
            while not self._is_closing:
                if self._given:
                    return self._given.popleft()
                if self._has_news:
                    self._has_news = False
                    if (work := self._find_work()) is not None:
                        self._has_news = True  # there may be more
                        return work
                else:
                    self._changed.wait()
        return None
