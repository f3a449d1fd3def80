"""Weights as bytes and back: to the bit as they are, and as near as the format promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import ConfigError
from metier.memory import weight_formats
from metier.memory.weight_formats import weight_format

SHAPES = [(1, 1), (3, 5), (16, 64), (33, 40)]


def _stored(name: str | None, weights_NOI: torch.Tensor) -> torch.Tensor:
    made = weight_format(name, tuple(weights_NOI.shape[1:]), weights_NOI.dtype)
    bytes_NB = torch.full((len(weights_NOI), made.num_bytes), 7, dtype=torch.uint8)
    for weight_OI, place_B in zip(weights_NOI, bytes_NB, strict=True):
        made.encode(weight_OI, place_B)
    return made.decode(bytes_NB)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [None, "int8", "nf4"])
def test_a_weight_begins_at_a_multiple_of_64_bytes(name, shape):
    assert weight_format(name, shape, torch.bfloat16).num_bytes % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_it_is_gives_the_same_numbers_and_copies_none(shape, dtype):
    weights_NOI = torch.randn(3, *shape).to(dtype)
    made = weight_format(None, shape, dtype)
    bytes_NB = torch.zeros(3, made.num_bytes, dtype=torch.uint8)
    for weight_OI, place_B in zip(weights_NOI, bytes_NB, strict=True):
        made.encode(weight_OI, place_B)
    got = made.decode(bytes_NB)
    assert torch.equal(got, weights_NOI)
    assert got.data_ptr() == bytes_NB.data_ptr()


@given(st.sampled_from(SHAPES), st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_int8_is_within_half_a_step_of_its_row(shape, seed, size):
    weights_NOI = size * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    step_NO1 = weights_NOI.abs().amax(-1, keepdim=True) / 127
    error_NOI = (_stored("int8", weights_NOI) - weights_NOI).abs()
    assert (error_NOI <= 0.5001 * step_NO1).all()


def test_int8_of_zeros_is_zeros():
    assert not _stored("int8", torch.zeros(1, 2, 8)).any()


# rows that are a multiple of 16 and none of 64 are those that bitsandbytes' own AVX-512 kernel decodes wrongly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (256, 96), (48, 32), (5, 160), (33, 48), (64, 128)])
def test_nf4_is_the_code_of_each_number_times_the_scale_of_its_64(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    size_O1 = torch.arange(1.0, shape[0] + 1)[:, None]
    weights_NOI = (size_O1 * torch.randn(2, *shape)).to(dtype)
    got = _stored("nf4", weights_NOI)
    for weight_OI, got_OI in zip(weights_NOI, got, strict=True):
        codes, state = functional.quantize_4bit(weight_OI, blocksize=64, quant_type="nf4")
        halves = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten()[: weight_OI.numel()]
        scales = state.absmax[torch.arange(weight_OI.numel()) // 64]
        expected = (state.code[halves.long()] * scales).to(dtype).view(shape)
        assert got_OI.dtype == dtype
        assert torch.equal(got_OI, expected)
        # the widest gap between two of NF4's 16 numbers is 0.31 of the scale
        furthest = scales.view(shape) * 0.16
        assert ((got_OI.float() - weight_OI.float()).abs() <= furthest).all()


def test_nf4_of_float64_is_refused():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=r"nf4 is for float32, bfloat16 and float16, got weights in torch\.float64"):
        weight_format("nf4", (4, 64), torch.float64)


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"weight_format: got 'int4', expected one of int8, nf4\."):
        weight_format("int4", (2, 2), torch.float32)


def test_nf4_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(weight_formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"nf4 needs bitsandbytes, which is not installed\. pip install 'metier\[nf4\]'"
    ):
        weight_format("nf4", (2, 2), torch.float32)
