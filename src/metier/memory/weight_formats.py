"""How a frozen weight is written down: as it is, in int8 by rows, or in NF4 by blocks.

A weight is a row of bytes, whatever the format, so that one piece of memory or of a file holds all that a product needs
of it: what turns codes back into numbers lies before the codes.
"""

# O outputs, I inputs, N weights of a stack, B bytes of one

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from metier.errors import ConfigError

FormatName = Literal["int8", "nf4"]
FORMATS: tuple[str, ...] = get_args(FormatName)

_ALIGNMENT = 64
"""Bytes; every weight of a stack begins at a multiple, as torch's own tensors do."""
_LARGEST_CODE = 127
_NF4_BLOCK = 64
"""Numbers that share a scale, as in QLoRA."""


class WeightFormat(Protocol):
    """Turns weights of one shape into bytes and back."""

    @property
    def num_bytes(self) -> int:
        """B, a multiple of 64."""
        ...

    def encode(self, weight_OI: Tensor, place_B: Tensor) -> None:
        """Write a weight to its place, uint8."""
        ...

    def decode(self, bytes_NB: Tensor) -> Tensor:
        """(N, O, I) in the weight's dtype, on the device of the bytes."""
        ...


@dataclass(frozen=True)
class AsItIs:
    """The numbers themselves; what is read is a view of the bytes."""

    shape: tuple[int, int]
    dtype: torch.dtype

    @cached_property
    def num_bytes(self) -> int:
        return _aligned(self._size)

    @property
    def _size(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def encode(self, weight_OI: Tensor, place_B: Tensor) -> None:
        place_B[: self._size].view(self.dtype).view(self.shape).copy_(weight_OI)

    def decode(self, bytes_NB: Tensor) -> Tensor:
        numbers_NP = bytes_NB.view(self.dtype)[:, : self.shape[0] * self.shape[1]]
        return numbers_NP.view(-1, *self.shape)


@dataclass(frozen=True)
class Int8Rows:
    """Codes of -127 to 127 and a float32 scale for every row: the largest of a row's numbers is met to rounding.

    A row is an output, but for experts that a family keeps transposed (GPT-OSS), where it is an input.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    @cached_property
    def num_bytes(self) -> int:
        return self._first_code + _aligned(self.shape[0] * self.shape[1])

    @cached_property
    def _first_code(self) -> int:
        return _aligned(4 * self.shape[0])

    def encode(self, weight_OI: Tensor, place_B: Tensor) -> None:
        scale_O1 = weight_OI.float().abs().amax(1, keepdim=True).div_(_LARGEST_CODE)
        codes_OI = weight_OI.float() / scale_O1.where(scale_O1 > 0, 1.0)
        num_outputs, num_inputs = self.shape
        place_B[: 4 * num_outputs].view(torch.float32).copy_(scale_O1.squeeze(1))
        place_B[self._first_code :][: num_outputs * num_inputs].view(torch.int8).view(self.shape).copy_(
            codes_OI.round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
        )

    def decode(self, bytes_NB: Tensor) -> Tensor:
        num_outputs, num_inputs = self.shape
        scale_NO = bytes_NB[:, : 4 * num_outputs].view(torch.float32)
        codes_NP = bytes_NB[:, self._first_code :][:, : num_outputs * num_inputs].view(torch.int8)
        return codes_NP.view(-1, *self.shape).to(self.dtype).mul_(scale_NO.unsqueeze(-1))


@dataclass(frozen=True)
class Nf4Blocks:
    """bitsandbytes' NF4: 4 bits a number, and a float32 scale for every 64 of them. QLoRA, arXiv:2305.14314."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "weight_format: nf4 needs bitsandbytes, which is not installed. pip install 'metier[nf4]', "
                "or use weight_format: int8."
            )
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"weight_format: nf4 is for float32, bfloat16 and float16, got weights in {self.dtype}. Load in one of "
                "them (dtype), or use weight_format: int8."
            )

    @cached_property
    def num_bytes(self) -> int:
        return self._first_code + _aligned(self._num_codes)

    @property
    def _num_blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // _NF4_BLOCK)

    @property
    def _num_codes(self) -> int:
        return -(-self.shape[0] * self.shape[1] // 2)

    @cached_property
    def _first_code(self) -> int:
        return _aligned(4 * self._num_blocks)

    def encode(self, weight_OI: Tensor, place_B: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight_OI.contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4")
        place_B[: 4 * self._num_blocks].view(torch.float32).copy_(state.absmax)
        place_B[self._first_code :][: self._num_codes].copy_(codes.view(-1))

    def decode(self, bytes_NB: Tensor) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # bitsandbytes' AVX-512 kernel gives rows whose length is no multiple of a block the scales of other rows
        num_numbers = self.shape[0] * self.shape[1]
        by_blocks = (1, num_numbers) if num_numbers % _NF4_BLOCK else (num_numbers // _NF4_BLOCK, _NF4_BLOCK)

        def decoded(bytes_B: Tensor) -> Tensor:
            scales = bytes_B[: 4 * self._num_blocks].view(torch.float32)
            codes = bytes_B[self._first_code :][: self._num_codes].view(-1, 1)
            state = QuantState(scales, by_blocks, blocksize=_NF4_BLOCK, quant_type="nf4", dtype=self.dtype)
            found: Tensor = dequantize_4bit(codes, state).view(self.shape)
            return found

        if len(bytes_NB) == 1:
            return decoded(bytes_NB[0]).unsqueeze(0)
        out_NOI = torch.empty(len(bytes_NB), *self.shape, dtype=self.dtype, device=bytes_NB.device)
        for out_OI, bytes_B in zip(out_NOI, bytes_NB, strict=True):
            out_OI.copy_(decoded(bytes_B))
        return out_NOI


def weight_format(name: str | None, shape: tuple[int, int], dtype: torch.dtype) -> WeightFormat:
    """The format of that name; None leaves numbers as they are.

    Raises:
        ConfigError: an unknown name, or what it needs is not installed.
    """
    if name is None:
        return AsItIs(shape, dtype)
    if name == "int8":
        return Int8Rows(shape, dtype)
    if name == "nf4":
        return Nf4Blocks(shape, dtype)
    raise ConfigError(f"weight_format: got {name!r}, expected one of {', '.join(FORMATS)}.")


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
