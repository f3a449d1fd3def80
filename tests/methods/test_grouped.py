"""Grouped products against one product a group, with empty groups and groups larger than one product takes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from metier.methods import grouped
from metier.methods.grouped import _on_device, grouped_matmul, grouped_outer

BOUNDS = (5, 5, 6, 1500, 1500, 1540)
"""Groups of 0, 1, 1494, 0 and 40 rows; the first row is number 5 of a larger matrix."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_group_meets_its_own_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(1535, 8, dtype=dtype), torch.randn(5, 8, 6, dtype=dtype)
    wanted = torch.cat(
        [rows[a - 5 : b - 5].double() @ w.double() for w, (a, b) in zip(weight, pairwise(BOUNDS), strict=True)]
    )
    # bf16 has 8 bits of mantissa, and sums of 8 products of about 1
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(grouped_matmul(rows, weight, BOUNDS).double(), wanted, **tolerance)
    place = torch.full((1535, 6), float("nan"), dtype=dtype)
    assert grouped_matmul(rows, weight, BOUNDS, place) is place
    torch.testing.assert_close(place.double(), wanted, **tolerance)


def test_in_16_bits_no_product_has_more_rows_than_kernels_are_kept_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = torch.mm

    def recorded(left: torch.Tensor, right: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(left))
        return plain(left, right, **kwargs)

    monkeypatch.setattr(grouped.torch, "mm", recorded)
    rows, weight = torch.randn(1535, 8), torch.randn(5, 8, 6)
    grouped_matmul(rows.bfloat16(), weight.bfloat16(), BOUNDS)
    assert sizes == [1, 512, 512, 470, 40]
    sizes.clear()
    grouped_matmul(rows, weight, BOUNDS)
    assert sizes == [1, 1494, 40]


def test_a_weights_gradient_takes_all_rows_of_its_group() -> None:
    left, right = torch.randn(1535, 6, dtype=torch.float64), torch.randn(1535, 8, dtype=torch.float64)
    out = torch.zeros(5, 6, 8, dtype=torch.float64)
    grouped_outer(left, right, BOUNDS, out)
    for group, (a, b) in enumerate(pairwise(BOUNDS)):
        torch.testing.assert_close(out[group], left[a - 5 : b - 5].T @ right[a - 5 : b - 5])


@pytest.mark.parametrize("width", [8, 12, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_kernels_get_rows_of_any_width(width: int, dtype: torch.dtype) -> None:
    """They refuse rows that do not begin at multiples of 16 bytes; a Key-Expert has as many rows as divide evenly."""
    bounds, offsets = (0, 10, 25), torch.tensor([10, 25], dtype=torch.int32)
    narrow, wide = torch.randn(25, width + 1, dtype=dtype)[:, 1:], torch.randn(25, 32, dtype=dtype)
    up, down = torch.randn(2, 32, width, dtype=dtype), torch.randn(2, width, 32, dtype=dtype)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    products = [
        (wide, up),
        (wide, torch.randn(2, width, 32, dtype=dtype).mT),
        (narrow, down),
        (narrow, torch.randn(2, 32, width, dtype=dtype).mT),
    ]
    for rows, weight in products:
        got = _on_device(rows, weight, offs=offsets)
        torch.testing.assert_close(got, grouped_matmul(rows, weight, bounds), **tolerance)
    for left, right in ((narrow, wide), (wide, narrow)):
        out = torch.zeros(2, left.shape[1], right.shape[1], dtype=dtype)
        grouped_outer(left, right, bounds, out)
        torch.testing.assert_close(_on_device(left.t(), right, offs=offsets), out, **tolerance)


def test_what_begins_at_multiples_of_16_bytes_is_not_copied_for_them() -> None:
    for matrix in (torch.randn(25, 32), torch.randn(25, 32).t(), torch.randn(2, 8, 32), torch.randn(2, 32, 8).mT):
        assert grouped._aligned(matrix) is matrix
