"""Which parts of a file encode a matrix: dtype, shape and names all have to fit."""

from __future__ import annotations

import pytest

from metier.deltas.encode import parts_fit

SHAPE = (6, 4)
FITTING = [
    {"plain": ("BF16", SHAPE)},
    {"int8": ("I8", SHAPE), "scale": ("F32", (6, 1))},
    {"int8_difference": ("I8", SHAPE), "scale": ("F32", (6, 1))},
    {"left": ("F32", (6, 2)), "right": ("F32", (2, 4))},
    {"left": ("BF16", (6, 3)), "right": ("BF16", (3, 4))},
]
NOT_FITTING = [
    {},
    {"plain": ("F32", SHAPE)},
    {"plain": ("BF16", (4, 6))},
    {"plain": ("BF16", SHAPE), "scale": ("F32", (6, 1))},
    {"int8": ("I8", SHAPE)},
    {"int8": ("U8", SHAPE), "scale": ("F32", (6, 1))},
    {"int8": ("I8", (4, 6)), "scale": ("F32", (6, 1))},
    {"int8": ("I8", SHAPE), "scale": ("BF16", (6, 1))},
    {"int8": ("I8", SHAPE), "scale": ("F32", (4, 1))},
    {"int8_difference": ("I8", SHAPE), "scale": ("F32", (6,))},
    {"left": ("F32", (6, 2)), "right": ("BF16", (2, 4))},
    {"left": ("I8", (6, 2)), "right": ("I8", (2, 4))},
    {"left": ("F32", (6, 2)), "right": ("F32", (3, 4))},
    {"left": ("F32", (5, 2)), "right": ("F32", (2, 4))},
    {"left": ("F32", (6, 2)), "right": ("F32", (2, 5))},
    {"left": ("F32", ()), "right": ("F32", (2, 4))},
    {"left": ("F32", (6, 2))},
]


@pytest.mark.parametrize("parts", FITTING)
def test_what_encodes_the_matrix_is_taken(parts: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    assert parts_fit(parts, SHAPE, "BF16")


@pytest.mark.parametrize("parts", NOT_FITTING)
def test_what_does_not_is_refused(parts: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    assert not parts_fit(parts, SHAPE, "BF16")


def test_a_vector_is_stored_plain_or_not_at_all() -> None:
    assert parts_fit({"plain": ("F32", (6,))}, (6,), "F32")
    assert not parts_fit({"int8": ("I8", (6,)), "scale": ("F32", (6, 1))}, (6,), "F32")
