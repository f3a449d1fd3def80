"""Steps leave processors to what works beside them, and take them back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from metier.serving.side_work import SideWork


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_a_step_has_as_many_threads_fewer_as_work_beside_it() -> None:
    work, seen = SideWork(), []

    def steps() -> None:
        work.begin_step()
        seen.append(torch.get_num_threads())
        work.end_step()
        for num in (1, 2, 9):
            with work.beside(num):
                work.begin_step()
                seen.append(torch.get_num_threads())
                work.end_step()
        work.begin_step()
        seen.append(torch.get_num_threads())
        work.end_step()

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    assert seen == [4, 3, 2, 1, 4]


def test_work_begins_once_the_running_step_has_made_room() -> None:
    work, seen, may_go_on = SideWork(), [], threading.Event()

    def step() -> None:
        work.begin_step()
        is_in_step.set()
        may_go_on.wait()
        time.sleep(0.01)
        work.leave_room()
        seen.append(("room", torch.get_num_threads()))
        time.sleep(0.02)  # in the middle of a layer
        work.end_step()

    is_in_step = threading.Event()
    thread = threading.Thread(target=step)
    thread.start()
    is_in_step.wait()
    may_go_on.set()
    with work.beside(2):
        seen.append(("work", 2))
    thread.join()
    assert seen == [("room", 2), ("work", 2)]


def test_work_does_not_wait_for_ever_or_for_nobody() -> None:
    work = SideWork()
    work.begin_step()
    began = time.monotonic()
    with work.beside(1):
        assert 0.02 < time.monotonic() - began < 1
    work.end_step()
    began = time.monotonic()
    with work.beside(1):
        assert time.monotonic() - began < 0.02


def test_at_its_end_a_thread_gives_the_number_back_that_it_had() -> None:
    work = SideWork()
    with work.beside(3):
        work.begin_step()
        work.end_step()
        assert torch.get_num_threads() == 1
    work.end()
    assert torch.get_num_threads() == 4
