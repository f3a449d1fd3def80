"""A sparsely activated adapter: for every token a few rows of a wide store fire, and no others are computed.

A router has picked `K` Key-Experts a token. Their rows are the token's candidates; the `top_k` with the largest
products fire:

    out(h) = Σ over chosen rows i of Key-Expert e:  ReLU(g_e · (h·a_i)) · b_i

with key `a_i`, value `b_i` and gate `g_e` (1 without a gate). A Key-Expert is a small expert with a ReLU, so pairs of
token and Key-Expert are sorted and multiplied as the virtual experts' are (`pairs.py`, `grouped.py`). Gradients of rows
go to the places of the step (`metier.memory.step_gradients`), for the Key-Experts that were used.

Source: MEFT, arXiv:2406.04984; the gate is the published code's, which the paper's Algorithm 1 has not.
"""

# T tokens, D hidden_size, K Key-Experts a token, N of a layer, A that are used, M rows of one, P rows in expert order

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metier.errors import RowStoreError
from metier.memory.disk_policy import Phase
from metier.memory.frozen_store import is_in_backward
from metier.memory.row_store import RowStore
from metier.memory.step_gradients import StepGradients
from metier.methods.grouped import add_grouped_outer, grouped_matmul
from metier.methods.pairs import block_rows, order_pairs, segments


def sparse_rows(
    hidden_TD: Tensor,
    key_experts_TK: Tensor,
    gate_TK: Tensor | None,
    gradients: StepGradients,
    *,
    top_k: int,
    chosen_NM: Tensor | None = None,
) -> Tensor:
    """The adapter's output, (T, D) in the dtype of `hidden_TD`.

    Args:
        hidden_TD: what the feed-forward block reads.
        key_experts_TK: numbers of each token's Key-Experts, int64, each once a token.
        gate_TK: their gates, or None for 1.
        gradients: of the store whose rows these are; gradients of rows are left there.
        top_k: rows that fire for a token at most, among its candidates.
        chosen_NM: which rows may fire instead, the same for every token, bool; `top_k` does not count then.
    """
    out_TD: Tensor = _SparseRows.apply(
        hidden_TD, gate_TK, gradients.holder, key_experts_TK, gradients, top_k, chosen_NM, gradients.is_wanted
    )
    return out_TD


@torch.no_grad()
def chosen_rows(
    hidden_TD: Tensor,
    key_experts_TK: Tensor,
    gate_TK: Tensor | None,
    store: RowStore,
    *,
    top_k: int,
    keep: bool = False,
) -> Tensor:
    """The rows that any token chooses, (N, M) bool: the union S of the paper's Algorithm 1.

    Args:
        hidden_TD, key_experts_TK, gate_TK, top_k: as of `sparse_rows`.
        store: with the rows.
        keep: whether the rows will be asked for again before the optimizer's next step.
    """
    used = _Used(hidden_TD, key_experts_TK, store, keep=keep)
    best_TKM = _best(_gated(_products(used, used.blocks(hidden_TD.device), hidden_TD), gate_TK), top_k)
    chosen_NM = torch.zeros(store.num_blocks, store.rows_per_block, dtype=torch.bool, device=hidden_TD.device)
    chosen_NM[used.block_ids] = used.any_token(best_TKM)
    return chosen_NM


class _Used:
    """The Key-Experts that some token has, their rows, and the order of the pairs."""

    def __init__(self, hidden_TD: Tensor, key_experts_TK: Tensor, store: RowStore, *, keep: bool) -> None:
        device, self.dtype = hidden_TD.device, hidden_TD.dtype
        active_A, self.places_TK = torch.unique(key_experts_TK, return_inverse=True)
        self.block_ids: list[int] = active_A.tolist()
        self.order = order_pairs(
            self.places_TK, self.places_TK, num_virtual=len(active_A), block=block_rows(device, self.dtype)
        )
        self.cuts = [(a, b, self.order.bounds[a : b + 1]) for a, b in segments(self.order.bounds, device)]
        """Groups that are worked on at once: the first, the one after the last, and where their rows are."""
        self.store, self.keep = store, keep

    def blocks(self, device: torch.device, phase: Phase = "forward") -> list[Tensor]:
        """(M, 2, D) for each, in the dtype that is computed in."""
        blocks = self.store.blocks(self.block_ids, device, keep=self.keep, phase=phase)
        return [block.to(self.dtype) for block in blocks]

    def any_token(self, flags_TKM: Tensor) -> Tensor:
        """Which rows of the used Key-Experts some token has flagged, (A, M) bool."""
        counts_AM = torch.zeros(len(self.block_ids), flags_TKM.shape[-1], device=flags_TKM.device)
        return counts_AM.index_add_(0, self.places_TK.flatten(), flags_TKM.flatten(0, 1).float()) > 0


def _products(used: _Used, blocks: Sequence[Tensor], hidden_TD: Tensor) -> Tensor:
    """Products of tokens with the keys of their Key-Experts, (T, K, M)."""
    order = used.order
    products_PM = hidden_TD.new_empty(len(order.token_P), used.store.rows_per_block)
    keys = [block[:, 0].t() for block in blocks]
    for first, last, cut in used.cuts:
        rows_PD = hidden_TD.index_select(0, order.token_P[cut[0] : cut[-1]])
        grouped_matmul(rows_PD, keys[first:last], cut, products_PM[cut[0] : cut[-1]])
    return order.by_token(products_PM)


def _gated(products_TKM: Tensor, gate_TK: Tensor | None) -> Tensor:
    return products_TKM if gate_TK is None else products_TKM * gate_TK.unsqueeze(-1)


def _best(gated_TKM: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest of each token, (T, K, M) bool."""
    if top_k >= gated_TKM[0].numel():
        return torch.ones_like(gated_TKM, dtype=torch.bool)
    best = gated_TKM.flatten(1).topk(top_k, sorted=False).indices
    none_TKM = torch.zeros_like(gated_TKM, dtype=torch.bool)
    return none_TKM.flatten(1).scatter_(1, best, True).view_as(gated_TKM)


class _SparseRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        gate_TK: Tensor | None,
        holder: Tensor,
        key_experts_TK: Tensor,
        gradients: StepGradients,
        top_k: int,
        chosen_NM: Tensor | None,
        keep: bool,
    ) -> Tensor:
        store, device = gradients.store, hidden_TD.device
        gradients.begin()
        with torch.autocast(device.type, enabled=False):
            used = _Used(hidden_TD, key_experts_TK, store, keep=keep)
            # with gradient checkpointing a layer runs again when the layers before it are what comes next
            blocks = used.blocks(device, "backward" if is_in_backward() else "forward")
            order = used.order
            gate_TK = None if gate_TK is None else gate_TK.to(hidden_TD.dtype)
            products_TKM = _products(used, blocks, hidden_TD)
            gated_TKM = _gated(products_TKM, gate_TK)
            fires_TKM = (gated_TKM > 0) & (
                _best(gated_TKM, top_k) if chosen_NM is None else chosen_NM[used.block_ids][used.places_TK]
            )
            active_PM = order.spread(gated_TKM * fires_TKM)
            out_PD = hidden_TD.new_empty(len(order.token_P), hidden_TD.shape[1])
            values = [block[:, 1] for block in blocks]
            for first, last, cut in used.cuts:
                grouped_matmul(active_PM[cut[0] : cut[-1]], values[first:last], cut, out_PD[cut[0] : cut[-1]])
            out_TD = order.summed(out_PD)
        ctx.save_for_backward(hidden_TD, gate_TK, products_TKM, fires_TKM)
        ctx.used, ctx.gradients, ctx.num_changes = used, gradients, store.num_changes
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, gate_TK, products_TKM, fires_TKM = ctx.saved_tensors
        wants_hidden, wants_gate, wants_rows = ctx.needs_input_grad[:3]
        used, device = ctx.used, grad_TD.device
        if ctx.num_changes != used.store.num_changes:
            raise RowStoreError(
                f"{used.store.name}: rows were changed between a forward pass and its backward one, whose gradients "
                "would be wrong; none was added to them.\nCall zero_grad, and run backward before the optimizer's step."
            )
        order = used.order
        # a forward pass may be one of several of the same tokens, or of an evaluation
        used.store.meter.used(used.block_ids, used.places_TK.flatten().bincount().tolist())
        with torch.autocast(device.type, enabled=False):
            grad_TD = grad_TD.to(hidden_TD.dtype).contiguous()
            blocks = used.blocks(device, "backward")
            values = [block[:, 1].t() for block in blocks]
            grad_PM = hidden_TD.new_empty(len(order.token_P), products_TKM.shape[-1])
            for first, last, cut in used.cuts:
                rows_PD = grad_TD.index_select(0, order.token_P[cut[0] : cut[-1]])
                grouped_matmul(rows_PD, values[first:last], cut, grad_PM[cut[0] : cut[-1]])
            grad_TKM = order.by_token(grad_PM) * fires_TKM
            grad_gate_TK = (grad_TKM * products_TKM).sum(-1) if wants_gate else None
            grad_products_PM = order.spread(grad_TKM if gate_TK is None else grad_TKM * gate_TK.unsqueeze(-1))
            # `autograd.grad` of other tensors, and `backward` with inputs, ask for none of rows
            holder = ctx.next_functions[1 if gate_TK is None else 2][0] if wants_rows else None
            if holder is not None and _is_asked_for(holder, used.store):
                active_PM = order.spread(_gated(products_TKM, gate_TK) * fires_TKM)
                places, fired, is_new = ctx.gradients.places(used.block_ids, device)
                for flags_M, some_token_M in zip(fired, used.any_token(fires_TKM), strict=True):
                    flags_M |= some_token_M
                # keys' gradients are those of the products times the inputs, values' the activations times the outputs'
                for kind, left_PM, right_TD in ((0, grad_products_PM, hidden_TD), (1, active_PM, grad_TD)):
                    _add_row_gradients(used, left_PM, right_TD, [place[:, kind] for place in places], is_new)
                ctx.gradients.changed(used.block_ids)
            grad_hidden_TD = None
            if wants_hidden:
                keys = [block[:, 0] for block in blocks]
                grad_PD = hidden_TD.new_empty(len(order.token_P), hidden_TD.shape[1])
                for first, last, cut in used.cuts:
                    part = slice(cut[0], cut[-1])
                    grouped_matmul(grad_products_PM[part], keys[first:last], cut, grad_PD[part])
                grad_hidden_TD = order.summed(grad_PD)
        # the gradient of rows is where it belongs already
        return grad_hidden_TD, grad_gate_TK, None, None, None, None, None, None


def _is_asked_for(holder: Any, store: RowStore) -> bool:
    """Whether the pass that is going on wants gradients of rows."""
    try:
        return torch._C._will_engine_execute_node(holder)
    except RuntimeError as error:  # a gradient that is to be returned, and not kept
        raise RowStoreError(
            f"{store.name}: got torch.autograd.grad of what stands for rows in a store, whose gradients lie in that; "
            "nothing was added.\nUse backward, or leave out parameters with `meft_gradients` in their names."
        ) from error


def _add_row_gradients(
    used: _Used, left_PM: Tensor, right_TD: Tensor, places_MD: Sequence[Tensor], is_new: Sequence[bool]
) -> None:
    for first, last, cut in used.cuts:
        part = slice(cut[0], cut[-1])
        rows_PD = right_TD.index_select(0, used.order.token_P[part])
        add_grouped_outer(left_PM[part], rows_PD, cut, places_MD[first:last], is_new[first:last])
