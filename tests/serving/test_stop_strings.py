"""Stop strings over any pieces: nothing of one is given out, nothing else is lost."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metier.serving.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=12)


def cut_slowly(text: str, stops: list[str]) -> tuple[str, bool]:
    """The reference: the first end of any stop string, and of those that end there the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
@example(["aaab"], ["aab"])
@example(["aba", "babb"], ["ababb"])
@example(["abb"], ["b", "ab"])
def test_pieces_are_cut_as_the_whole_text_is(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    given_out = "".join(finder.push(piece) for piece in pieces)
    is_found = finder.is_found
    assert (given_out + finder.finish(), is_found) == cut_slowly("".join(pieces), stops)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_only_the_longest_beginning_of_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    pushed = given_out = ""
    beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
    for piece in pieces:
        pushed, given_out = pushed + piece, given_out + finder.push(piece)
        if finder.is_found:
            return
        held = max((beginning for beginning in beginnings if pushed.endswith(beginning)), key=len)
        assert given_out + held == pushed


def test_text_after_a_stop_string_is_dropped() -> None:
    finder = StopStrings(["END"])
    assert [finder.push("one E"), finder.push("ND two"), finder.push("three"), finder.finish()] == ["one ", "", "", ""]


@pytest.mark.parametrize("stops", [[], ["zz"]])
def test_text_without_a_stop_string_is_not_held_back(stops: list[str]) -> None:
    finder = StopStrings(stops)
    assert [finder.push("abc"), finder.push("d")] == ["abc", "d"]


def test_a_long_stop_string_takes_linear_time() -> None:
    finder = StopStrings(["a" * 50_000 + "b"] * 4)
    start = time.perf_counter()
    for _ in range(1000):
        finder.push("a" * 60)
    assert time.perf_counter() - start < 3  # comparing each beginning with the text takes minutes
