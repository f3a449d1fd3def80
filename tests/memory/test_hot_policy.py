"""Which blocks stay on a device."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metier.memory.hot_policy import HotPolicy


def test_free_places_go_to_the_most_used():
    policy = HotPolicy(2)
    for blocks in ([1, 2, 3], [2, 3], [3]):
        policy.used(blocks)
    assert policy.changes([]) == ([], [3, 2])


def test_a_block_that_is_used_no_more_gives_way():
    policy = HotPolicy(1)
    policy.used([1])
    for _ in range(3):
        policy.used([2])
    assert policy.changes([1]) == ([1], [2])


def test_two_that_are_used_alike_do_not_trade_places():
    policy = HotPolicy(1)
    for _ in range(5):
        policy.used([1])
        policy.used([2])
    assert policy.changes([1]) == ([], [])


def test_a_block_never_used_is_given_up_first():
    policy = HotPolicy(2)
    policy.used([5])
    policy.used([5, 6])
    assert policy.changes([5, 9]) == ([9], [6])


@given(
    st.integers(0, 5),
    st.lists(st.lists(st.integers(0, 9), max_size=6, unique=True), max_size=8),
)
def test_never_more_than_fit_and_none_twice(capacity, steps):
    policy, kept = HotPolicy(capacity), []
    for blocks in steps:
        policy.used(blocks)
        given_up, taken = policy.changes(kept)
        assert set(given_up) <= set(kept)
        assert not set(taken) & set(kept)
        kept = [block for block in kept if block not in given_up] + taken
        assert len(kept) == len(set(kept)) <= capacity
