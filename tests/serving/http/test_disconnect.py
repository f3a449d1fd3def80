"""A client that leaves: its answers are stopped and its place is free."""

from __future__ import annotations

import threading

import httpx2
import pytest

from serving.fake_engine import FakeEngine
from serving.http.serving_app import chat, wait_until

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_leaving_a_stream_stops_all_of_its_answers(address: str, engine: FakeEngine, n: int, num_tokens: int) -> None:
    engine.hold_after = num_tokens
    with httpx2.stream("POST", address + CHAT, json=chat(stream=True, n=n)) as response:
        parts = response.iter_bytes()  # kept: the client closes the stream of an iterator that is not
        next(parts)
        wait_until(lambda: all(generation.num_given == num_tokens for generation in engine.generations))
        assert engine.num_running == n
    wait_until(lambda: [generation.is_cancelled for generation in engine.generations] == [True] * n)


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_before_a_whole_answer_stops_all_of_its_answers(address: str, engine: FakeEngine, n: int) -> None:
    engine.hold_after = 1
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(address + CHAT, json=chat(n=n), timeout=0.3)
    wait_until(lambda: [generation.is_cancelled for generation in engine.generations] == [True] * n)


def test_an_answer_that_was_left_counts_as_cancelled(address: str, engine: FakeEngine) -> None:
    def num_cancelled() -> float:
        name = 'metier_requests_total{model="medicine",outcome="cancelled"}'
        lines = httpx2.get(address + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = num_cancelled()
    engine.hold_after = 1
    with httpx2.stream("POST", address + CHAT, json=chat(model="medicine", stream=True)) as response:
        parts = response.iter_bytes()
        next(parts)
    wait_until(lambda: num_cancelled() == before + 1)


def test_a_stream_that_is_read_to_its_end_is_not_cancelled(address: str, engine: FakeEngine) -> None:
    assert httpx2.post(address + CHAT, json=chat(stream=True)).text.endswith("data: [DONE]\n\n")
    assert not engine.generations[0].is_cancelled


def test_many_clients_that_leave_at_random_leave_nothing_behind(address: str, engine: FakeEngine) -> None:
    engine.token_seconds = 0.002
    engine.reply = lambda generation: "word " * 50

    def ask(number: int) -> None:
        with httpx2.stream("POST", address + CHAT, json=chat(stream=number % 2 == 0)) as response:
            for count, _ in enumerate(response.iter_bytes()):
                if count == number % 5:
                    return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: engine.num_running == 0)
    assert httpx2.post(address + CHAT, json=chat()).status_code == 200
