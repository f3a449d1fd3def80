"""Who starts next, from made-up requests: no engine, no delta."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from metier.errors import OverloadedError
from metier.serving.admission import Admission


def line_up(*requests: tuple[str, str | None], max_waiting: int = 1000, max_passes: int = 64) -> Admission:
    admission = Admission(max_waiting=max_waiting, max_passes=max_passes)
    for request_id, delta in requests:
        admission.add(request_id, delta)
    return admission


def test_requests_start_in_the_order_in_which_they_came() -> None:
    admission = line_up(("1", "a"), ("2", None), ("3", "b"))
    assert admission.next(2, {"a", "b"}) == ["1", "2"]
    assert admission.next(2, {"a", "b"}) == ["3"]
    assert admission.num_waiting == 0


def test_no_more_start_than_there_are_slots() -> None:
    admission = line_up(("1", "a"))
    assert admission.next(0, {"a"}) == []
    assert admission.num_waiting == 1


def test_a_request_whose_delta_is_not_there_is_passed() -> None:
    admission = line_up(("1", "a"), ("2", "b"), ("3", None))
    assert admission.next(3, {"b"}) == ["2", "3"]
    assert admission.next(3, {"a", "b"}) == ["1"]


def test_requests_of_one_delta_do_not_pass_each_other() -> None:
    admission = line_up(("1", "a"), ("2", "a"), ("3", "a"))
    assert admission.next(9, {"a"}) == ["1", "2", "3"]


def test_deltas_take_turns_when_slots_are_scarce() -> None:
    flood = [(f"a{number}", "a") for number in range(100)]
    admission = line_up(*flood, ("b1", "b"), ("b2", "b"), ("base", None))
    resident = {"a", "b"}
    assert [admission.next(1, resident) for _ in range(6)] == [["a0"], ["b1"], ["base"], ["a1"], ["b2"], ["a2"]]


def test_a_newcomer_does_not_wait_for_the_flood_before_it() -> None:
    admission = line_up(*((f"a{number}", "a") for number in range(100)), max_passes=2)
    admission.next(50, {"a"})
    admission.add("b", "b")
    assert admission.next(2, {"a", "b"}) == ["a50", "b"]


def test_nobody_starts_before_a_request_that_has_been_passed_often_enough() -> None:
    admission = line_up(("late", "late"), *((f"{number}", "a") for number in range(10)), max_passes=3)
    assert admission.next(10, {"a"}) == ["0", "1", "2"]
    assert admission.next(10, {"a"}) == []
    assert admission.next(10, {"a", "late"}) == ["late", "3", "4", "5", "6", "7", "8", "9"]


def test_a_request_counts_as_passed_only_from_when_it_is_first_in_its_line() -> None:
    admission = line_up(*((f"a{number}", "a") for number in range(5)), max_passes=2)
    admission.next(3, {"a"})
    admission.add("b", "b")
    admission.add("c", "c")
    # a3 came long before b, but three starts of its own kind do not make it due
    assert admission.next(9, {"b", "c"}) == ["b", "c"]


def test_deltas_are_waited_for_in_the_order_of_their_turns() -> None:
    admission = line_up(("1", "a"), ("2", None), ("3", "b"), ("4", "a"))
    assert admission.waiting_deltas() == ["a", "b"]
    assert admission.next(1, {"a", "b"}) == ["1"]
    assert admission.waiting_deltas() == ["b", "a"]


def test_a_cancelled_request_never_starts() -> None:
    admission = line_up(("1", "a"), ("2", "a"), ("3", "b"))
    assert admission.cancel("1")
    assert admission.cancel("3")
    assert not admission.cancel("3")
    assert admission.next(9, {"a", "b"}) == ["2"]
    assert not admission.cancel("2")
    assert admission.waiting_deltas() == []


def test_all_requests_of_a_delta_are_cancelled_at_once() -> None:
    admission = line_up(("1", "a"), ("2", "b"), ("3", "a"))
    assert admission.cancel_delta("a") == ["1", "3"]
    assert admission.num_waiting == 1
    assert admission.cancel_delta("a") == []
    assert admission.next(9, {"a", "b"}) == ["2"]


def test_the_one_behind_a_cancelled_request_is_not_due_in_its_stead() -> None:
    admission = line_up(("1", "late"), ("2", "late"), *((f"a{n}", "a") for n in range(4)), max_passes=2)
    admission.next(2, {"a"})
    admission.cancel("1")
    assert admission.next(1, {"a"}) == ["a2"]


def test_a_request_stays_due_when_one_behind_it_is_cancelled() -> None:
    admission = line_up(("1", "late"), ("2", "late"), *((f"a{n}", "a") for n in range(4)), max_passes=2)
    admission.next(2, {"a"})
    admission.cancel("2")
    assert admission.next(1, {"a"}) == []


def test_requests_beyond_the_limit_are_refused() -> None:
    admission = line_up(("1", "a"), ("2", "b"), ("3", "c"), max_waiting=3)
    with pytest.raises(
        OverloadedError,
        match=r"^3 requests wait already, 0 of them for the base, where 3 may wait, and for one model no more than it "
        r"leaves free\.\nTry again later\.$",
    ):
        admission.add("4", None)
    admission.cancel("1")
    admission.add("4", None)


def test_a_flood_for_one_delta_leaves_places_for_others() -> None:
    admission = line_up(*((f"{number}", "a") for number in range(5)), max_waiting=10)
    with pytest.raises(OverloadedError, match="5 requests wait already, 5 of them for 'a', where 10 may wait"):
        admission.add("5", "a")
    for number in range(5):
        admission.add(f"other {number}", f"other {number}")


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    num_slots=st.integers(1, 4),
    max_passes=st.integers(1, 5),
)
def test_while_all_wait_and_all_are_there_each_delta_gets_as_many_starts(
    lengths: list[int], num_slots: int, max_passes: int
) -> None:
    requests = [(f"{delta}.{number}", f"{delta}") for delta, length in enumerate(lengths) for number in range(length)]
    admission = line_up(*requests, max_passes=max_passes)
    started: list[str] = []
    while admission.num_waiting:
        started += admission.next(num_slots, {delta for _, delta in requests})
    assert sorted(started) == sorted(request_id for request_id, _ in requests)
    for number in range(len(started)):
        served = [sum(x.startswith(f"{delta}.") for x in started[:number]) for delta in range(len(lengths))]
        waiting = [served[delta] for delta, length in enumerate(lengths) if served[delta] < length]
        assert not waiting or max(served) <= max(waiting) + 1
        assert not waiting or max(waiting) - min(waiting) <= 1


class Engine(RuleBasedStateMachine):
    """Requests come, are cancelled and start, deltas come and go: nobody is passed for ever, and nobody is lost."""

    MAX_PASSES = 3
    DELTAS = (None, "a", "b", "c", "d")

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(max_waiting=40, max_passes=self.MAX_PASSES)
        self.lines: dict[str | None, list[str]] = {delta: [] for delta in self.DELTAS}
        self.passes: dict[str, int] = {}
        self.count = 0

    @rule(delta=st.sampled_from(DELTAS), number=st.integers(1, 5))
    def come(self, delta: str | None, number: int) -> None:
        for _ in range(number):
            num_own, num_all = len(self.lines[delta]), sum(map(len, self.lines.values()))
            self.count += 1
            try:
                self.admission.add(str(self.count), delta)
            except OverloadedError:
                assert num_own >= 40 - num_all
                return
            assert num_own < 40 - num_all
            self.lines[delta].append(str(self.count))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiting = sorted(request_id for line in self.lines.values() for request_id in line)
        if waiting:
            request_id = data.draw(st.sampled_from(waiting))
            assert self.admission.cancel(request_id)
            for line in self.lines.values():
                if request_id in line:
                    line.remove(request_id)

    @rule(num_slots=st.integers(0, 4), resident=st.sets(st.sampled_from("abcd")))
    def start(self, num_slots: int, resident: set[str]) -> None:
        started = self.admission.next(num_slots, resident)
        assert len(started) <= num_slots
        for request_id in started:
            delta = next(delta for delta, line in self.lines.items() if request_id in line)
            assert delta is None or delta in resident
            assert self.lines[delta][0] == request_id
            self.lines[delta].pop(0)
            for other in filter(None, self.lines.values()):
                if other is not self.lines[delta]:
                    self.passes[other[0]] = self.passes.get(other[0], 0) + 1
        could_start = any(line and (delta is None or delta in resident) for delta, line in self.lines.items())
        if len(started) < num_slots and could_start:
            # slots stay free only for one that has been passed often enough
            assert any(self.passes.get(line[0], 0) >= self.MAX_PASSES for line in self.lines.values() if line)

    @invariant()
    def nobody_is_passed_for_ever(self) -> None:
        # those that are due at the same time go one after the other
        assert max(self.passes.values(), default=0) <= self.MAX_PASSES + len(self.DELTAS) - 1

    @invariant()
    def what_is_said_to_wait_waits(self) -> None:
        assert self.admission.num_waiting == sum(map(len, self.lines.values()))
        assert sorted(self.admission.waiting_deltas()) == [d for d, line in self.lines.items() if line and d]

    def teardown(self) -> None:
        """Once every delta is there, every request starts."""
        while self.admission.num_waiting:
            before = self.admission.num_waiting
            self.start(1, set("abcd"))
            assert self.admission.num_waiting == before - 1


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
