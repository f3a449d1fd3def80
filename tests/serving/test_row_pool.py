"""Slots of single experts: taken once, given back once, no larger than an expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import ServingError
from metier.serving.row_pool import RowPool

SHAPES = {"gate_up_proj": (6, 4), "down_proj": (4, 3)}


def pool(num_slots: int = 5) -> RowPool:
    return RowPool(SHAPES, num_slots, dtype=torch.bfloat16)


def test_a_slot_takes_the_bytes_of_one_expert() -> None:
    made = pool()
    assert made.slot_bytes == (6 * 4 + 4 * 3) * 2
    assert sum(tensor.nbytes for tensor in made.tensors.values()) == 5 * made.slot_bytes


def test_a_row_is_kept_in_the_dtype_of_the_base() -> None:
    made = pool()
    row = torch.randn(4, 3)
    made.write(2, "down_proj", row)
    assert torch.equal(made.tensors["down_proj"][2], row.bfloat16())


def test_more_slots_than_are_free_is_an_error_that_takes_none() -> None:
    made = pool(3)
    made.take(2)
    with pytest.raises(ServingError, match="got 2 experts to place, expected at most 1, as many of its 3 slots"):
        made.take(2)
    assert made.num_free == 1


def test_giving_a_slot_back_twice_fails() -> None:
    made = pool()
    slots = made.take(2)
    made.give_back(slots)
    with pytest.raises(AssertionError, match="given back once"):
        made.give_back(slots[:1])


@given(st.lists(st.integers(0, 4), max_size=30))
def test_no_slot_is_ever_two_deltas(sizes: list[int]) -> None:
    made, held = pool(12), []
    for size in sizes:
        if size <= made.num_free:
            held.append(made.take(size))
        elif held:
            made.give_back(held.pop(0))
        taken = [slot for slots in held for slot in slots]
        assert len(taken) == len(set(taken)) == 12 - made.num_free
