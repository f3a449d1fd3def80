"""Grouped matrix products: one weight a group, each group's rows lying together.

Three products make a linear layer and its backward pass. On CUDA they are torch's grouped kernels; elsewhere a loop of
plain products that skips empty groups, which on a CPU is what torch's own kernel does too, without its copies.
"""

# P rows in group order, G groups, I inputs, O outputs

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGNMENT = 16
"""Bytes."""
CPU_MOST_ROWS = 512
"""Rows of one product on a CPU in 16 bits. oneDNN makes and keeps a kernel for every shape, so there should be few."""


def grouped_matmul(
    rows_PI: Tensor, weight_GIO: Tensor | Sequence[Tensor], bounds: Sequence[int], out_PO: Tensor | None = None
) -> Tensor:
    """`rows[bounds[g]:bounds[g+1]] @ weight[g]` for every group, (P, O) in the dtype of the inputs.

    Args:
        rows_PI: rows in group order; row 0 is `bounds[0]`.
        weight_GIO: any strides, so that a transposed view costs nothing; or one weight a group, wherever it lies.
        bounds: G + 1 row numbers, ascending.
        out_PO: where to write the result, if there is a place for it already.
    """
    if rows_PI.is_cuda:
        if not isinstance(weight_GIO, Tensor):
            # copies of those that are needed
            filled = [group for group, (first, end) in enumerate(pairwise(bounds)) if end > first] or [0]
            bounds = [bounds[0], *(bounds[group + 1] for group in filled)]
            weight_GIO = torch.stack([weight_GIO[group] for group in filled])
        product_PO = _on_device(rows_PI, weight_GIO, offs=_offsets(bounds, rows_PI.device))
        return product_PO if out_PO is None else out_PO.copy_(product_PO)
    if out_PO is None:
        out_PO = rows_PI.new_empty(rows_PI.shape[0], weight_GIO[0].shape[1])
    most_rows = CPU_MOST_ROWS if rows_PI.dtype.itemsize < 4 else None
    groups, sizes = _filled(bounds, most_rows)
    weights = weight_GIO.unbind() if isinstance(weight_GIO, Tensor) else weight_GIO
    for group, rows_RI, place_RO in zip(groups, rows_PI.split(sizes), out_PO.split(sizes), strict=True):
        torch.mm(rows_RI, weights[group], out=place_RO)
    return out_PO


def grouped_outer(left_PO: Tensor, right_PI: Tensor, bounds: Sequence[int], out_GOI: Tensor) -> None:
    """`left[rows of g].T @ right[rows of g]` for every group, into (G, O, I): a linear layer's weight gradient.

    An empty group's place is left as it is, and is to hold zeros.
    """
    if left_PO.is_cuda:
        out_GOI.copy_(_on_device(left_PO.t(), right_PI, offs=_offsets(bounds, left_PO.device)))
        return
    groups, sizes = _filled(bounds)
    places = out_GOI.unbind()
    for group, left_OR, right_RI in zip(groups, left_PO.t().split(sizes, dim=1), right_PI.split(sizes), strict=True):
        torch.mm(left_OR, right_RI, out=places[group])


def add_grouped_outer(
    left_PO: Tensor, right_PI: Tensor, bounds: Sequence[int], places_OI: Sequence[Tensor], is_new: Sequence[bool]
) -> None:
    """`grouped_outer` into one place a group, each added to what is there, or written over it where that is new.

    Every group has rows.
    """
    if left_PO.is_cuda:
        products_GOI = _on_device(left_PO.t(), right_PI, offs=_offsets(bounds, left_PO.device))
        for place, product_OI, new in zip(places_OI, products_GOI, is_new, strict=True):
            place.copy_(product_OI) if new else place.add_(product_OI)
        return
    groups, sizes = _filled(bounds)
    for group, left_OR, right_RI in zip(groups, left_PO.t().split(sizes, dim=1), right_PI.split(sizes), strict=True):
        place = places_OI[group]
        if place.dtype != left_PO.dtype:
            product_OI = left_OR @ right_RI
            place.copy_(product_OI) if is_new[group] else place.add_(product_OI)
        elif is_new[group]:
            torch.mm(left_OR, right_RI, out=place)
        else:
            torch.addmm(place, left_OR, right_RI, out=place)


def grouped_sum(rows_PO: Tensor, bounds: Sequence[int], out_GO: Tensor) -> None:
    """Sum of every group's rows, into (G, O): a bias' gradient. An empty group's place is left as it is."""
    groups, sizes = _filled(bounds)
    places = out_GO.unbind()
    for group, rows_RO in zip(groups, rows_PO.split(sizes), strict=True):
        torch.sum(rows_RO, dim=0, out=places[group])


def grouped_repeat(values_GO: Tensor, bounds: Sequence[int]) -> Tensor:
    """Every group's vector once a row, (P, O): a bias spread over its rows."""
    counts = torch.tensor([last - first for first, last in pairwise(bounds)], device=values_GO.device)
    return values_GO.repeat_interleave(counts, dim=0)


def _on_device(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
    return F.grouped_mm(_aligned(left), _aligned(right), offs=offs)


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix, or each of a stack, in memory whose rows (or columns, of a transposed one) begin at multiples of 16
    bytes, as torch's grouped kernels want it; the matrix itself where they do."""
    is_transposed = matrix.stride(-2) == 1 and matrix.shape[-2] > 1
    rows = matrix.mT if is_transposed else matrix
    multiple = _ALIGNMENT // matrix.itemsize
    if rows.stride(-1) == 1 and rows.stride(-2) % multiple == 0 and matrix.data_ptr() % _ALIGNMENT == 0:
        return matrix
    width = rows.shape[-1]
    padded = rows.new_empty(*rows.shape[:-1], -(-width // multiple) * multiple)[..., :width].copy_(rows)
    return padded.mT if is_transposed else padded


def _filled(bounds: Sequence[int], most_rows: int | None = None) -> tuple[list[int], list[int]]:
    """The groups that have rows, and how many each; large ones in several parts."""
    groups, sizes = [], []
    for group, (start, end) in enumerate(pairwise(bounds)):
        step = most_rows or max(1, end - start)
        for first in range(start, end, step):
            groups.append(group)
            sizes.append(min(step, end - first))
    return groups, sizes


def _offsets(bounds: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([end - bounds[0] for end in bounds[1:]], dtype=torch.int32, device=device)
