"""Which token of a batch uses which delta."""

from __future__ import annotations

import threading

import pytest

from metier.serving.step import NO_DELTA, current_step, make_step, running


def test_each_token_has_the_number_of_its_requests_delta() -> None:
    step = make_step([(3, 2), (NO_DELTA, 1), (1, 3)])
    assert step.number_T.tolist() == [3, 3, 0, 1, 1, 1]
    assert step.numbers == (1, 3)


def test_neighbouring_requests_of_one_delta_are_one_run() -> None:
    step = make_step([(2, 1), (2, 4), (NO_DELTA, 2), (2, 1)])
    assert step.runs == ((2, 0, 5), (0, 5, 7), (2, 7, 8))


def test_only_requests_that_ask_are_counted() -> None:
    step = make_step([(1, 2), (2, 1), (1, 1)], counted=[None, 0, 1])
    assert step.counted_T is not None
    assert step.counted_T.tolist() == [-1, -1, 0, 1]
    assert step.num_counted == 2


def test_where_nobody_asks_nothing_is_counted() -> None:
    assert make_step([(1, 2)], counted=[None]).counted_T is None


def test_a_step_belongs_to_its_thread_and_ends() -> None:
    seen: list[object] = []
    with running(make_step([(1, 1)])) as step:
        assert current_step() is step
        thread = threading.Thread(target=lambda: seen.append(current_step()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert current_step() is None


def test_a_step_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="in the model"), running(make_step([(1, 1)])):
        raise RuntimeError("in the model")
    assert current_step() is None
