"""Sort token-expert pairs so that each expert's rows lie together: the bookkeeping of every sparse layer.

A router gives every token `K` experts. The products want it the other way round, all rows of one expert side by side.
`PairOrder` holds that order and the way back; both ways are gathers, so no pass needs a scattered addition.
"""

# T tokens, K top_k, V virtual experts, S = T * K pairs, P = S and the rows that fill up blocks

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_BLOCK = 32
"""Rows of one expert are filled up to a multiple of this where products run through oneDNN, which makes a kernel for
every new shape: with as many shapes as there are row counts, making them costs several times what running them does.
Together with `grouped.CPU_MOST_ROWS` it leaves 16 shapes a product, made within the first steps."""


CPU_SEGMENT_ROWS = 1024
"""Rows that are taken through a whole expert layer at once on a CPU, so that what lies between two products stays in
the cache."""

CPU_SEGMENT_TOKENS = 128
"""The same where a token's slots are gathered and summed."""


@dataclass(frozen=True, slots=True)
class PairOrder:
    """The rows of a sparse layer in expert order."""

    token_P: Tensor
    """Which token a row holds, int64; a filling row holds some token's values, and weighs nothing."""
    pair_P: Tensor
    """Which (token, slot) pair a row is, int64, flattened; S for a filling row."""
    row_TK: Tensor
    """In which row each pair lies, int64."""
    bounds: tuple[int, ...]
    """Row at which each virtual expert begins, and the end: V + 1 entries."""

    def spread(self, values_TK: Tensor) -> Tensor:
        """Per-pair values (T, K, …) as (P, …), 0 in filling rows."""
        flat = values_TK.flatten(0, 1)
        if len(self.pair_P) > len(flat):
            flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return flat.index_select(0, self.pair_P)

    def by_token(self, rows_PX: Tensor) -> Tensor:
        """Rows (P, …) as (T, K, …)."""
        return _rows_at(rows_PX, self.row_TK)

    def summed(self, rows_PD: Tensor) -> Tensor:
        """Each token's rows added up, (T, D)."""
        if rows_PD.device.type != "cpu" or rows_PD.dtype.itemsize >= 4:
            # in one pass, without the gathered rows
            return F.embedding_bag(self.row_TK, rows_PD, mode="sum")
        # there it rounds bfloat16's halves up, which are many
        out_TD = rows_PD.new_empty(len(self.row_TK), rows_PD.shape[1])
        for part in _token_chunks(len(out_TD), out_TD.device):
            torch.sum(_rows_at(rows_PD, self.row_TK[part]), dim=1, out=out_TD[part])
        return out_TD

    def weighted(self, rows_PD: Tensor, weights_TK: Tensor, out_TD: Tensor) -> None:
        """Write each token's rows times their weights, added up as transformers' grouped backend does, to the bit."""
        for part in _token_chunks(len(out_TD), out_TD.device):
            rows_TKD, weights_TK1 = _rows_at(rows_PD, self.row_TK[part]), weights_TK[part].unsqueeze(-1)
            is_same = weights_TK.dtype == rows_PD.dtype
            out_TD[part] = (rows_TKD.mul_(weights_TK1) if is_same else rows_TKD * weights_TK1).sum(1)


def order_pairs(expert_ids_TK: Tensor, virtual_ids_TK: Tensor, *, num_virtual: int, block: int) -> PairOrder:
    """Sort pairs by virtual expert id, each expert's rows filled up to a multiple of `block`.

    Rows of one virtual expert keep the order that transformers' grouped backend gives the pairs of one expert: what a
    matrix product makes of a row depends, in its last bit, on where the row lies in its group.

    Args:
        expert_ids_TK: what the router chose, int64.
        virtual_ids_TK: which virtual expert that is, int64, in [0, num_virtual).
        block: 1 leaves no filling rows.
    """
    num_tokens, top_k = virtual_ids_TK.shape
    as_transformers_S = torch.sort(expert_ids_TK.reshape(-1)).indices
    sorted_S, order_S = torch.sort(virtual_ids_TK.reshape(-1)[as_transformers_S], stable=True)
    pair_S = as_transformers_S[order_S]
    count_V = torch.bincount(sorted_S, minlength=num_virtual)
    size_V = (count_V + block - 1) // block * block
    bounds = (0, *size_V.cumsum(0).tolist())
    if block == 1:
        row_S, pair_P = torch.arange(pair_S.numel(), device=pair_S.device), pair_S
    else:
        shift_V = (size_V.cumsum(0) - size_V) - (count_V.cumsum(0) - count_V)
        row_S = torch.arange(pair_S.numel(), device=pair_S.device) + shift_V[sorted_S]
        pair_P = pair_S.new_full((bounds[-1],), pair_S.numel())
        pair_P[row_S] = pair_S
    row_TK = torch.empty_like(pair_S)
    row_TK[pair_S] = row_S
    token_P = (pair_P // top_k).clamp_(max=num_tokens - 1)
    return PairOrder(token_P, pair_P, row_TK.view(num_tokens, top_k), bounds)


def block_rows(device: torch.device, dtype: torch.dtype) -> int:
    """How many rows `order_pairs` should fill a block up to, for products on `device` in `dtype`."""
    return CPU_BLOCK if device.type == "cpu" and dtype.itemsize < 4 else 1


def segments(bounds: Sequence[int], device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut a bank's groups into runs of whole groups, `(first group, last group + 1)`; on a GPU there is one run."""
    num_groups = len(bounds) - 1
    if device.type != "cpu":
        yield 0, num_groups
        return
    first = 0
    for last in range(1, num_groups + 1):
        if last == num_groups or bounds[last + 1] - bounds[first] > CPU_SEGMENT_ROWS:
            if bounds[last] > bounds[first]:
                yield first, last
            first = last


def _rows_at(rows_PX: Tensor, ids_TK: Tensor) -> Tensor:
    # on a CPU a selection takes half the time of indexing
    return rows_PX.index_select(0, ids_TK.flatten()).view(*ids_TK.shape, *rows_PX.shape[1:])


def _token_chunks(num_tokens: int, device: torch.device) -> Iterator[slice]:
    """Cut tokens into runs small enough for a CPU's cache; on a GPU there is one run."""
    step = CPU_SEGMENT_TOKENS if device.type == "cpu" else max(1, num_tokens)
    for first in range(0, num_tokens, step):
        yield slice(first, min(first + step, num_tokens))
