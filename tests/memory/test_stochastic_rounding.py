"""Rounding to bfloat16 at random: exact in the mean, and what bfloat16 holds stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.memory.stochastic_rounding import round_stochastically


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_infinities_and_nan_stay_and_so_does_the_largest_number():
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), torch.finfo(torch.bfloat16).max])
    rounded = round_stochastically(values.repeat(1000), generator())
    torch.testing.assert_close(rounded.float(), values.repeat(1000), rtol=0, atol=0, equal_nan=True)


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(0, 1000))
def test_a_value_goes_to_one_of_its_two_neighbours(value, seed):
    rounded = float(round_stochastically(torch.tensor([value]), generator(seed)))
    bits = torch.tensor([value]).view(torch.int32)
    low = (bits & -(1 << 16)).view(torch.float32)
    high = ((bits & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert rounded in (float(low), float(high))
    assert rounded == value or float(low) != value


@pytest.mark.parametrize("value", [1.001, -3.3e-7, 12345.678])
def test_the_mean_is_exact(value):
    many = torch.full((200_000,), value)
    mean = float(round_stochastically(many, generator()).double().mean())
    # steps of 2^-8 of the value, and 200,000 draws: five deviations of the mean
    assert abs(mean - float(many[0])) < 5 * 2**-8 * abs(value) / 2 / 200_000**0.5


def test_the_same_seed_gives_the_same_numbers():
    values = torch.randn(1000, generator=generator(5))
    assert torch.equal(round_stochastically(values, generator(1)), round_stochastically(values, generator(1)))
    assert not torch.equal(round_stochastically(values, generator(1)), round_stochastically(values, generator(2)))
