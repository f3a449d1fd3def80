"""Encode one expert matrix in fewer bytes, and decode it to the same bits on every machine. Pure tensors, no files.

An encoded matrix is a dictionary of parts, whose names say how to decode it; `B` is the base's matrix:

| parts | the matrix is |
|---|---|
| `plain` | `plain` |
| `int8`, `scale` | `int8 * scale` |
| `int8_difference`, `scale` | `B + int8_difference * scale` |
| `left`, `right` | `B + left @ right` |

Decoding adds and multiplies element by element in float32, in a fixed order. A matrix product would round otherwise
from machine to machine, and then no sum could say whether what is served is what was measured.
"""

# M rows and N columns of one expert's matrix as it is stored, R rank

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Parts = dict[str, Tensor]
_LARGEST_CODE = 127
_TIGHTER = (1.0, 0.9, 0.7, 0.5)
"""Shares of the error that singular values may cause; the rest is left to rounding."""


def encode_int8(matrix_MN: Tensor, base_MN: Tensor) -> Parts:
    """8 bits a value with one float32 scale a row, of the matrix or of its difference from the base.

    Rounding costs up to half a scale, which is the largest value of a row over 127. Training moves values by far less
    than they are, so the difference has the finer scale, unless a matrix moved as far as it is large. Both are
    decoded and that with the smaller squared error is taken.
    """
    candidates = (
        _int8("int8", matrix_MN.float()),
        _int8("int8_difference", matrix_MN.float() - base_MN.float()),
    )
    return min(candidates, key=lambda parts: _squared_error(matrix_MN, base_MN, parts))


def encode_low_rank(matrix_MN: Tensor, base_MN: Tensor, *, max_relative_error: float) -> Parts:
    """The difference from the base as a product of the lowest rank that keeps the error, or the plain matrix.

    The rank comes from the singular values. The error is then measured on what decoding gives, rounding of the factors
    and of the result included; the plain matrix is kept where no rank keeps it in fewer bytes.

    Args:
        matrix_MN: of a 16-bit dtype, whose factors are bfloat16; or a wider one, whose factors are float32.
        max_relative_error: ‖decoded − matrix‖ / ‖matrix − base‖ in the Frobenius norm, over 0.
    """
    difference_MN = matrix_MN.float() - base_MN.float()
    left_MM, values, right_MN = torch.linalg.svd(difference_MN, full_matrices=False)
    factor_dtype = torch.bfloat16 if matrix_MN.element_size() == 2 else torch.float32
    # the error of each rank: what the singular values from there on hold
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()
    for share in _TIGHTER:
        rank = max(1, int((tail > share * max_relative_error * float(difference_MN.norm())).sum()))
        root = values[:rank].sqrt()
        parts = {
            "left": (left_MM[:, :rank] * root).to(factor_dtype).contiguous(),
            "right": (root[:, None] * right_MN[:rank]).to(factor_dtype).contiguous(),
        }
        if num_bytes(parts) >= matrix_MN.nbytes:
            break
        if relative_error(matrix_MN, base_MN, decode(parts, base_MN, matrix_MN.dtype)) <= max_relative_error:
            return parts
    return {"plain": matrix_MN}


def decode(parts: Mapping[str, Tensor], base_MN: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix that `parts` encode, (M, N) in `dtype`; the same bits on every machine."""
    if "plain" in parts:
        return parts["plain"].to(dtype)
    if "int8" in parts:
        return (parts["int8"].float() * parts["scale"]).to(dtype)
    if "int8_difference" in parts:
        return (base_MN.float() + parts["int8_difference"].float() * parts["scale"]).to(dtype)
    left_MR, right_RN = parts["left"].float(), parts["right"].float()
    product_MN = torch.zeros(left_MR.shape[0], right_RN.shape[1])
    for rank in range(left_MR.shape[1]):
        product_MN += left_MR[:, rank, None] * right_RN[rank]
    return (base_MN.float() + product_MN).to(dtype)


def parts_fit(parts: Mapping[str, tuple[str, tuple[int, ...]]], shape: tuple[int, ...], dtype: str) -> bool:
    """Whether parts, given by dtype and shape as safetensors spells them, encode a matrix of `shape` and `dtype`."""
    if parts.keys() == {"plain"}:
        return parts["plain"] == (dtype, shape)
    if len(shape) != 2:
        return False
    num_rows, num_columns = shape
    for codes in ("int8", "int8_difference"):
        if parts.keys() == {codes, "scale"}:
            return parts[codes] == ("I8", shape) and parts["scale"] == ("F32", (num_rows, 1))
    if parts.keys() != {"left", "right"}:
        return False
    (left, left_shape), (right, right_shape) = parts["left"], parts["right"]
    rank = left_shape[-1] if left_shape else 0
    return (
        left == right
        and left in ("BF16", "F32")
        and (left_shape, right_shape) == ((num_rows, rank), (rank, num_columns))
    )


def relative_error(matrix_MN: Tensor, base_MN: Tensor, decoded_MN: Tensor) -> float:
    """‖decoded − matrix‖ / ‖matrix − base‖: the share of what training changed that is lost."""
    lost = float((decoded_MN.double() - matrix_MN.double()).norm())
    changed = float((matrix_MN.double() - base_MN.double()).norm())
    if changed == 0:
        return 0.0 if lost == 0 else float("inf")
    return lost / changed


def num_bytes(parts: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in parts.values())


def _int8(name: str, values_MN: Tensor) -> Parts:
    scale_M1 = values_MN.abs().amax(1, keepdim=True) / _LARGEST_CODE
    codes_MN = values_MN / scale_M1.where(scale_M1 > 0, torch.ones(()))
    return {name: codes_MN.round().clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8), "scale": scale_M1}


def _squared_error(matrix_MN: Tensor, base_MN: Tensor, parts: Parts) -> float:
    decoded_MN = decode(parts, base_MN, matrix_MN.dtype)
    return float((decoded_MN.double() - matrix_MN.double()).square().sum())
