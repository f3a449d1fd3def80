"""One thread: what it is given comes in order, what it finds comes after that, and it sleeps between."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from metier.serving.loader_thread import LoaderThread, Work

WAIT = 10.0


class Finder:
    def __init__(self) -> None:
        self.left: list[Work] = []
        self.num_calls = 0

    def __call__(self) -> Work | None:
        self.num_calls += 1
        return self.left.pop(0) if self.left else None


Begin = Callable[..., LoaderThread]


@pytest.fixture
def begin() -> Iterator[Begin]:
    threads: list[LoaderThread] = []

    def make(find_work: Callable[[], Work | None], on_death: Callable[[BaseException], None] = print) -> LoaderThread:
        threads.append(LoaderThread(threading.Condition(threading.RLock()), find_work=find_work, on_death=on_death))
        return threads[-1]

    yield make
    for thread in threads:
        thread.close()


def test_given_work_is_done_in_order_and_before_work_that_is_found(begin: Begin) -> None:
    done: queue.Queue[str] = queue.Queue()
    finder, gate = Finder(), threading.Event()
    finder.left = [lambda: done.put("found 1"), lambda: done.put("found 2")]
    thread = begin(finder)
    thread.do(lambda: gate.wait(WAIT))  # type: ignore[arg-type, return-value]
    thread.wake()
    thread.do(lambda: done.put("given 1"))
    thread.do(lambda: done.put("given 2"))
    gate.set()
    assert [done.get(timeout=WAIT) for _ in range(4)] == ["given 1", "given 2", "found 1", "found 2"]


def test_it_looks_for_work_only_after_something_changed(begin: Begin) -> None:
    finder, done = Finder(), threading.Event()
    thread = begin(finder)
    thread.do(done.set)
    assert done.wait(WAIT)
    assert finder.num_calls == 0
    thread.wake()
    thread.close()
    assert finder.num_calls <= 1


def test_closing_ends_it_and_leaves_what_was_not_begun(begin: Begin) -> None:
    gate, is_at_work, done = threading.Event(), threading.Event(), []
    thread = begin(Finder())

    def work() -> None:
        is_at_work.set()
        gate.wait(WAIT)
        done.append("begun")

    thread.do(work)
    thread.do(lambda: done.append("not begun"))
    assert is_at_work.wait(WAIT)
    closing = threading.Thread(target=thread.close)
    closing.start()
    while not thread._is_closing:
        time.sleep(0.001)
    gate.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert done == ["begun"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_in_the_work_is_told_and_ends_it(begin: Begin) -> None:
    told: queue.Queue[BaseException] = queue.Queue()
    thread = begin(Finder(), told.put)
    thread.do(lambda: [][0])
    assert isinstance(told.get(timeout=WAIT), IndexError)
    thread.close()
