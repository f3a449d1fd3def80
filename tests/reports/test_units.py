"""Numbers for people."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from metier.reports import units


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (units.count, 9_999, "9,999"),
        (units.count, 12_345, "12.3 K"),
        (units.count, 17_700_000, "17.7 M"),
        (units.count, 15.7e9, "15.7 B"),
        (units.size, 512, "512 B"),
        (units.size, 2_621_440, "2.6 MB"),
        (units.size, 1.9e9, "1.9 GB"),
        (units.duration, 4.24, "4.2 s"),
        (units.duration, 185, "3 min 05 s"),
        (units.duration, 59.96, "1 min 00 s"),
        (units.duration, 3599.7, "1 h 00 min"),
        (units.duration, 7_620, "2 h 07 min"),
        (units.share, 0.943, "94%"),
        (units.share, -0.1, "\u221210%"),
    ],
)
def test_numbers_are_written_for_people(write: Callable[[float], str], value: float, expected: str) -> None:
    assert write(value) == expected


@pytest.mark.parametrize("write", [units.count, units.size, units.duration, units.share])
def test_what_is_missing_is_a_dash(write: Callable[[float | None], str]) -> None:
    assert write(None) == units.number(None, digits=1) == units.signed(None, digits=1) == "–"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0312, "+0.031"), (-0.0312, "\u22120.031"), (0.0004, "0.000"), (-0.0004, "0.000")],
)
def test_differences_carry_their_sign_unless_they_round_to_nothing(value: float, expected: str) -> None:
    assert units.signed(value, digits=3) == expected
