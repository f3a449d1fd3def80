"""Experts that get a row or two each, which is what a batch of many deltas makes of them.

The product of one row with a matrix is the sum of the matrix's rows, weighted by the row's values: what an embedding
bag computes, for any number of rows with a matrix of its own choice each, in one call. It reads memory at nearly twice
the rate of a product of one row by BLAS, and what a row becomes does not hang on the others. So experts that fit in a
core's cache are multiplied so where they have few rows, and by plain products where they have many; larger experts by
plain products always. It wants matrices that lie input by input.
"""

# T tokens, D hidden_size, K top_k, S = T * K pairs, P pairs in order, G groups: experts with rows, I inputs, O outputs
# W matrices of a stack

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_ROWS = 12
"""Of one expert: with more a plain product is as quick, by measurement on 192 x 256."""
MOST_BYTES = 1 << 19
"""Of one matrix: each row reads it anew, so it is to stay in the second level of a core's cache."""


def are_small(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether experts of such matrices (inputs and outputs in any order) are multiplied as is said above."""
    most = max(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    return device.type == "cpu" and dtype == torch.float32 and most * dtype.itemsize <= MOST_BYTES


def by_inputs(stack_WOI: Tensor) -> Tensor:
    """The same values and shape, lying in memory as (W, I, O)."""
    return stack_WOI.mT.contiguous().mT


def empty_by_inputs(shape: tuple[int, ...]) -> Tensor:
    """An empty float32 stack (W, O, I) that lies in memory as (W, I, O)."""
    num, num_outputs, num_inputs = shape
    return torch.empty(num, num_inputs, num_outputs).mT


def chosen_products(rows_PI: Tensor, stack_WIO: Tensor, chosen_P: Tensor) -> Tensor:
    """`rows[p] @ stack[chosen[p]]` for every row: (P, O).

    Args:
        rows_PI: float32; rows of one matrix side by side, so that it is read once.
        stack_WIO: contiguous.
        chosen_P: int64.
    """
    num_matrices, num_inputs, num_outputs = stack_WIO.shape
    dtype = torch.int32 if num_matrices * num_inputs < 2**31 else torch.int64
    first_P1 = (chosen_P * num_inputs).to(dtype).unsqueeze(-1)
    index_PI = first_P1 + torch.arange(num_inputs, dtype=dtype, device=rows_PI.device)
    table_JO = stack_WIO.view(-1, num_outputs)
    return F.embedding_bag(index_PI, table_JO, mode="sum", per_sample_weights=rows_PI)


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Pairs of token and expert: base experts with few rows, slots with few rows, then all that have many."""

    token_P: Tensor
    chosen_P: Tensor
    """The expert of the base, or the number of the base's experts and the slot: int64."""
    row_TK: Tensor
    """In which row each pair lies."""
    num_few_base: int
    num_few: int
    """Rows of experts with few rows, the base's first."""
    many: tuple[int, ...]
    """What each expert with many rows is chosen by."""
    bounds: tuple[int, ...]
    """Rows at which those begin, and the end."""


def order_rows(chosen_TK: Tensor, *, num_experts: int) -> RowOrder:
    """Sort pairs so that each expert's rows lie together, those with many rows last."""
    chosen_S = chosen_TK.flatten()
    chosen_G, group_S, count_G = torch.unique(chosen_S, return_inverse=True, return_counts=True)
    chosen, counts = chosen_G.tolist(), count_G.tolist()
    few = [(each, count) for each, count in zip(chosen, counts, strict=True) if count <= MOST_ROWS]
    many = [(each, count) for each, count in zip(chosen, counts, strict=True) if count > MOST_ROWS]
    if few and many:
        group_S = group_S + len(chosen) * (count_G > MOST_ROWS)[group_S]
    pair_P = group_S.argsort(stable=True)
    row_S = torch.empty_like(pair_P)
    row_S[pair_P] = torch.arange(len(pair_P), device=pair_P.device)
    num_few = sum(count for _, count in few)
    return RowOrder(
        token_P=pair_P // chosen_TK.shape[1],
        chosen_P=chosen_S[pair_P],
        row_TK=row_S.view(chosen_TK.shape),
        num_few_base=sum(count for each, count in few if each < num_experts),
        num_few=num_few,
        many=tuple(each for each, _ in many),
        bounds=tuple(accumulate((count for _, count in many), initial=num_few)),
    )


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear layer of all experts, the base's and the slots'."""

    base_EIO: Tensor
    slots_SIO: Tensor
    base_bias_EO: Tensor | None = None
    slots_bias_SO: Tensor | None = None

    def of(self, rows_PI: Tensor, order: RowOrder) -> Tensor:
        """Each row through its expert: (P, O)."""
        num_experts = len(self.base_EIO)
        parts = (
            (self.base_EIO, self.base_bias_EO, slice(0, order.num_few_base), 0),
            (self.slots_SIO, self.slots_bias_SO, slice(order.num_few_base, order.num_few), num_experts),
        )
        out_PO = rows_PI.new_empty(len(rows_PI), self.base_EIO.shape[2])
        for stack, bias, part, first in parts:
            if part.stop > part.start:
                chosen = order.chosen_P[part] - first if first else order.chosen_P[part]
                out_PO[part] = chosen_products(rows_PI[part], stack, chosen)
                if bias is not None:
                    out_PO[part] += bias[chosen]
        for each, (start, end) in zip(order.many, pairwise(order.bounds), strict=True):
            of_base = each < num_experts
            stack, bias = (self.base_EIO, self.base_bias_EO) if of_base else (self.slots_SIO, self.slots_bias_SO)
            index = each if of_base else each - num_experts
            torch.mm(rows_PI[start:end], stack[index], out=out_PO[start:end])
            if bias is not None:
                out_PO[start:end] += bias[index]
        return out_PO


def few_rows_experts(
    hidden_TD: Tensor,
    chosen_TK: Tensor,
    weights_TK: Tensor,
    *,
    up: Projection,
    down: Projection,
    activation: Callable[[Tensor], Tensor],
    output_norm: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Sum over a token's slots of `routing weight * expert(hidden)`: (T, D).

    Args:
        hidden_TD: float32.
        chosen_TK: the base's expert, or the number of the base's experts and a slot: int64.
    """
    order = order_rows(chosen_TK, num_experts=len(up.base_EIO))
    out_PD = down.of(activation(up.of(hidden_TD[order.token_P], order)), order)
    if output_norm is not None:
        out_PD = output_norm(out_PD)
    return F.embedding_bag(order.row_TK, out_PD, mode="sum", per_sample_weights=weights_TK.to(out_PD.dtype))
