"""Freed memory goes back where the process would else grow past its peak, and nowhere else."""

from __future__ import annotations

import pytest

from metier.memory.heap_policy import HeapPolicy

MB = 1 << 20


def test_gives_back_everywhere_as_long_as_it_does_not_know_what_comes() -> None:
    policy = HeapPolicy()
    policy.begin_step()
    assert [policy.should_give_back(held * MB, 500 * MB) for held in (100, 110, 120)] == [True, True, True]


def _a_step(policy: HeapPolicy, held: list[int], peak: int, after: list[int] | None = None) -> list[bool]:
    policy.begin_step()
    given = []
    for place, num in enumerate(held):
        given.append(policy.should_give_back(num * MB, peak * MB))
        if given[-1] and after is not None:
            policy.gave_back(after[place] * MB)
    return given


def test_then_only_where_what_comes_would_pass_the_peak() -> None:
    policy = HeapPolicy()
    _a_step(policy, [100, 140, 180], peak=200)
    # on from 100 it grew by 40, on from 140 too, and nobody saw what came after 180
    assert _a_step(policy, [150, 165, 199], peak=200) == [False, True, False]
    assert _a_step(policy, [100, 159, 200], peak=200) == [False, False, True]


def test_growth_that_went_before_it_was_looked_at_shows_in_a_new_peak() -> None:
    policy = HeapPolicy()
    policy.begin_step()
    policy.should_give_back(100 * MB, 100 * MB)
    # it held 190 on the way, of which 110 are left
    policy.should_give_back(110 * MB, 190 * MB)
    assert _a_step(policy, [99, 110], peak=190) == [False, False]
    assert _a_step(policy, [100, 110], peak=190) == [True, False]


def test_growth_counts_from_what_was_left_after_giving_back() -> None:
    policy = HeapPolicy()
    _a_step(policy, [150, 160], peak=300, after=[100, 160])
    assert _a_step(policy, [239, 250], peak=300)[0] is False
    assert _a_step(policy, [240, 250], peak=300)[0] is True


def test_the_last_place_leads_to_the_first_one_of_the_next_step() -> None:
    policy = HeapPolicy()
    _a_step(policy, [100, 110], peak=110)
    # the optimizer held 180
    policy.begin_step()
    policy.should_give_back(100 * MB, 180 * MB)
    assert policy.should_give_back(109 * MB, 180 * MB) is False
    assert _a_step(policy, [100, 110], peak=180) == [False, True]


def test_a_step_may_have_more_places_than_the_one_before() -> None:
    policy = HeapPolicy()
    _a_step(policy, [100], peak=200)
    assert _a_step(policy, [100, 110, 120], peak=200) == [False, True, True]


@pytest.mark.parametrize("most", [0, 30])
def test_steps_that_are_alike_never_pass_the_first_ones_peak(most: int) -> None:
    """A heap in which half of what a place needed for itself stays as a hole until it is given back."""
    policy, peak, peaks = HeapPolicy(), 100, []
    for _ in range(6):
        live, holes = 100, 0
        policy.begin_step()
        for _place in range(10):
            if policy.should_give_back((live + holes) * MB, peak * MB):
                holes = 0
                policy.gave_back(live * MB)
            peak = max(peak, live + holes + most)
            live, holes = live + 5, holes + most // 2
        peaks.append(peak)
    assert set(peaks) == {peaks[0]}
