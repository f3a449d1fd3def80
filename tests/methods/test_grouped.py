"""Grouped products against one product a group, with empty groups and groups larger than one product takes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from metier.methods import grouped
from metier.methods.grouped import grouped_matmul, grouped_outer

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
