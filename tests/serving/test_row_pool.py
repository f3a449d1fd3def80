"""Slots of single experts: taken once, given back once, no larger than an expert."""

from __future__ import annotations

import subprocess
import sys

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


def test_slots_are_ready_that_were_written_or_made_ready() -> None:
    made = pool(5)
    assert made.num_ready == 0
    made.make_ready(2 * made.slot_bytes)
    assert made.num_ready == 2
    taken = made.take(3)
    assert made.num_ready == 0
    made.give_back(taken[:1])
    assert made.num_ready == 1
    made.make_ready(1)
    assert made.num_ready == 2
    made.make_ready(10**6)
    assert made.num_ready == made.num_free == 3


def test_making_ready_leaves_alone_what_is_taken() -> None:
    made = pool(4)
    for slot in made.take(2):
        for tensor in made.tensors.values():
            tensor[slot] = 7
    made.make_ready(10**6)
    for tensor in made.tensors.values():
        assert (tensor[:2] == 7).all()


IN_A_PROCESS = """
import mmap, resource, sys, torch
from metier.serving.row_pool import RowPool

def num_faults(slot):
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    made.write(slot, "up_proj", row)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

dtype = getattr(torch, sys.argv[1])
row = torch.ones(512, 2048, dtype=dtype)
made = RowPool({"up_proj": (512, 2048)}, 64, dtype=dtype)
made.write(60, "up_proj", row)  # whatever is needed to copy at all
made.make_ready(2 * made.slot_bytes)
print(*(num_faults(slot) / (row.nbytes / mmap.PAGESIZE) for slot in made.take(3)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slot_that_is_ready_is_written_without_page_faults(dtype: str) -> None:
    # in a process of its own, where no memory is left of what was before
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS, dtype], capture_output=True, text=True, check=True)
    first, second, third = map(float, done.stdout.split())
    assert first + second < 0.1
    assert third > 0.9
