"""Virtual experts: one pass over a base bank of experts and any number of banks that replace some of them.

A *bank* is a stack of expert weights. Virtual ids number the rows of all banks in turn, the base's first; a table says
which virtual id a request's expert is. Pairs are sorted by virtual id, so each bank's rows are one block, grouped by
expert (`pairs.py`, `grouped.py`). Training is the case of one bank that wants gradients; a batch that mixes adapters
is the case of several. The router is never touched.

What one pass keeps for the backward pass is the up projection's output and, if a bank is trained, the layer's input.
The base bank's backward computes the input gradient alone.
"""

# T tokens, D hidden_size, F moe_intermediate_size, E experts of a bank, K top_k, P rows in virtual expert order
# U = 2F where experts are gated, else F

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from metier.methods.grouped import grouped_matmul, grouped_outer, grouped_repeat, grouped_sum
from metier.methods.pairs import PairOrder, block_rows, order_pairs, segments, token_chunks

Activation = Callable[[Tensor], Tensor]
"""(P, U) → (P, F), row by row: the gate of the family, or its plain activation function."""


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """A stack of experts: `up` then `down`, each with its bias where the family has biases."""

    up: Tensor
    """(E, U, D), or (E, D, U) where transposed."""
    down: Tensor
    """(E, D, F), or (E, F, D) where transposed."""
    up_bias: Tensor | None = None
    """(E, U)"""
    down_bias: Tensor | None = None
    """(E, D)"""

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.up, self.down, self.up_bias, self.down_bias)

    def to(self, dtype: torch.dtype) -> ExpertBank:
        up_bias = None if self.up_bias is None else self.up_bias.detach().to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.detach().to(dtype)
        return ExpertBank(self.up.detach().to(dtype), self.down.detach().to(dtype), up_bias, down_bias)


def virtual_experts(
    hidden_TD: Tensor,
    expert_ids_TK: Tensor,
    virtual_ids_TK: Tensor,
    routing_weights_TK: Tensor,
    *,
    base: ExpertBank,
    deltas: tuple[ExpertBank, ...],
    activation: Activation,
    is_transposed: bool,
) -> Tensor:
    """Sum over a token's slots of `routing weight * expert(hidden)`, each slot's expert taken from the bank it names.

    Computes in the dtype of the base bank, as transformers' grouped backend does, and gives the same result to the bit
    where an expert's rows are multiples of 64 bytes wide (else a CPU's matrix product may round by alignment). Delta
    banks may be float32 masters of a bf16 base: they are cast for the products and get
    float32 gradients.

    Args:
        hidden_TD: any float dtype.
        expert_ids_TK: what the router chose, int64.
        virtual_ids_TK: where that expert's weights are, int64; the base's rows are 0 … E-1, then each delta's in turn.
        routing_weights_TK: any float dtype; gradients flow to it.
        base: frozen; never gets a gradient.
        activation: elementwise over rows, differentiable by autograd.
        is_transposed: layout of all banks.

    Returns:
        (T, D) in the dtype of `hidden_TD`.
    """
    flat = tuple(tensor for delta in deltas for tensor in delta.tensors())
    layer = ExpertsLayer(base, activation, is_transposed)
    out_TD: Tensor = _VirtualExperts.apply(hidden_TD, routing_weights_TK, (expert_ids_TK, virtual_ids_TK), layer, *flat)
    return out_TD


class LowRank(Protocol):
    """What a bank adds to its weights, group by group, without forming their sum (`low_rank.py`).

    Each method gets the rows of the groups `first` to `last - 1`, and writes into its last argument or keeps
    gradients to itself.
    """

    def add_up(self, first: int, last: int, rows_PD: Tensor, up_PU: Tensor) -> None: ...

    def add_down(self, first: int, last: int, inner_PF: Tensor, out_PD: Tensor) -> None: ...

    def add_inner_gradient(self, first: int, last: int, grad_PD: Tensor, grad_inner_PF: Tensor) -> None: ...

    def add_row_gradient(self, first: int, last: int, grad_up_PU: Tensor, grad_rows_PD: Tensor) -> None: ...

    def keep_gradients(
        self, first: int, last: int, rows_PD: Tensor, grad_up_PU: Tensor, inner_PF: Tensor, grad_PD: Tensor
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class ExpertsLayer:
    """What all banks of a layer have in common, and the base."""

    base: ExpertBank
    activation: Activation
    is_transposed: bool

    def up(self, bank: ExpertBank) -> Tensor:
        """(E, D, U)"""
        return bank.up if self.is_transposed else bank.up.mT

    def down(self, bank: ExpertBank) -> Tensor:
        """(E, F, D)"""
        return bank.down if self.is_transposed else bank.down.mT

    def bounds(self, order: PairOrder, banks: list[ExpertBank]) -> list[tuple[int, ...]]:
        """For each bank the part of `order.bounds` that is its own."""
        ends = list(accumulate((bank.up.shape[0] for bank in banks), initial=0))
        return [order.bounds[ends[i] : ends[i + 1] + 1] for i in range(len(banks))]


def _unflatten(flat: tuple[Tensor | None, ...]) -> list[ExpertBank]:
    return [ExpertBank(*flat[i : i + 4]) for i in range(0, len(flat), 4)]  # type: ignore[arg-type]


class _VirtualExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        ids_TK: tuple[Tensor, Tensor],
        layer: ExpertsLayer,
        *flat: Tensor | None,
    ) -> Tensor:
        dtype, device = layer.base.up.dtype, hidden_TD.device
        wants_rows = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wants_flat = ctx.needs_input_grad[4:]
        with torch.autocast(device.type, enabled=False):
            banks = [layer.base, *(delta.to(dtype) for delta in _unflatten(flat))]
            num_virtual = sum(bank.up.shape[0] for bank in banks)
            order = order_pairs(*ids_TK, num_virtual=num_virtual, block=block_rows(device, dtype))
            inputs_TD = hidden_TD.to(dtype)
            out_PD = inputs_TD.new_empty(len(order.token_P), inputs_TD.shape[-1])
            kept: list[Tensor | None] = []
            for number, (bank, bounds) in enumerate(zip(banks, layer.bounds(order, banks), strict=True)):
                is_trained = number > 0 and any(wants_flat[4 * number - 4 : 4 * number])
                keeps = wants_rows or is_trained
                kept.append(bank_forward(layer, bank, bounds, order, inputs_TD, out_PD, keeps=keeps))
            out_TD = hidden_TD.new_empty(hidden_TD.shape)
            for part in token_chunks(len(out_TD), device):
                out_TD[part] = (out_PD[order.row_TK[part]] * weights_TK[part].unsqueeze(-1)).sum(1)
        ctx.save_for_backward(hidden_TD if any(wants_flat) else None, weights_TK, *kept, *flat)
        ctx.layer, ctx.order = layer, order
        ctx.hidden_dtype = hidden_TD.dtype
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        layer, order = ctx.layer, ctx.order
        wants_hidden, wants_weights, _, _, *wants_flat = ctx.needs_input_grad
        hidden_TD, weights_TK, *saved = ctx.saved_tensors
        dtype, num_banks = layer.base.up.dtype, 1 + len(wants_flat) // 4
        kept, flat = saved[:num_banks], tuple(saved[num_banks:])
        with torch.autocast(grad_TD.device.type, enabled=False):
            banks = [layer.base, *(delta.to(dtype) for delta in _unflatten(flat))]
            back = ExpertsBackward(layer, order, grad_TD.to(dtype), order.spread(weights_TK), wants_hidden)
            grads_flat: list[Tensor | None] = []
            for number, (bank, bounds) in enumerate(zip(banks, layer.bounds(order, banks), strict=True)):
                wanted = wants_flat[4 * number - 4 : 4 * number] if number else [False] * 4
                grads = [
                    None if t is None or not wants else torch.zeros_like(t)
                    for t, wants in zip(bank.tensors(), wanted, strict=True)
                ]
                if kept[number] is not None:
                    back.run(bank, bounds, kept[number], None if hidden_TD is None else hidden_TD.to(dtype), grads)
                grads_flat += grads if number else []
            grad_hidden_TD = None if back.rows_PD is None else back.summed_over_slots().to(ctx.hidden_dtype)
            grad_weights_TK = back.weight_P[order.row_TK] if wants_weights else None
        grads_flat = [None if g is None else g.to(t.dtype) for g, t in zip(grads_flat, flat, strict=True)]
        return grad_hidden_TD, grad_weights_TK, None, None, *grads_flat


def bank_forward(
    layer: ExpertsLayer,
    bank: ExpertBank,
    bounds: tuple[int, ...],
    order: PairOrder,
    inputs_TD: Tensor,
    out_PD: Tensor,
    *,
    keeps: bool,
    low_rank: LowRank | None = None,
) -> Tensor | None:
    """One bank's rows through its experts, written to their place in `out_PD`; returns the up projection's output."""
    up_EDU, down_EFD = layer.up(bank), layer.down(bank)
    kept_PU = inputs_TD.new_empty(bounds[-1] - bounds[0], up_EDU.shape[-1]) if keeps else None
    for first, last in segments(bounds, inputs_TD.device):
        cut = bounds[first : last + 1]
        rows_PD = inputs_TD[order.token_P[cut[0] : cut[-1]]]
        place_PU = None if kept_PU is None else kept_PU[cut[0] - bounds[0] : cut[-1] - bounds[0]]
        up_PU = grouped_matmul(rows_PD, up_EDU[first:last], cut, place_PU)
        if bank.up_bias is not None:
            up_PU.add_(grouped_repeat(bank.up_bias[first:last], cut))
        if low_rank is not None:
            low_rank.add_up(first, last, rows_PD, up_PU)
        place_PD, inner_PF = out_PD[cut[0] : cut[-1]], layer.activation(up_PU)
        grouped_matmul(inner_PF, down_EFD[first:last], cut, place_PD)
        if low_rank is not None:
            low_rank.add_down(first, last, inner_PF, place_PD)
        if bank.down_bias is not None:
            place_PD.add_(grouped_repeat(bank.down_bias[first:last], cut))
    return kept_PU


class ExpertsBackward:
    """The backward pass of one layer, bank by bank; collects the gradients of the rows and of the routing weights."""

    def __init__(
        self, layer: ExpertsLayer, order: PairOrder, grad_TD: Tensor, routing_weight_P: Tensor, wants_hidden: bool
    ) -> None:
        self.layer, self.order, self.grad_TD, self.routing_weight_P = layer, order, grad_TD, routing_weight_P
        self.weight_P = torch.zeros_like(routing_weight_P)
        self.rows_PD = grad_TD.new_empty(len(order.token_P), grad_TD.shape[-1]) if wants_hidden else None

    def run(
        self,
        bank: ExpertBank,
        bounds: tuple[int, ...],
        kept_PU: Tensor,
        inputs_TD: Tensor | None,
        grads: list[Tensor | None],
        low_rank: LowRank | None = None,
    ) -> None:
        """Write one bank's part; `grads` are places for those of `up, down, up_bias, down_bias` that are wanted.

        With `out = W inner + b` the routing weight's gradient is `<grad, out> = <W.T grad, inner> + <grad, b>`, and
        `W.T grad` is wanted anyway: so the down projection's output is neither kept nor computed again.
        """
        up_EDU, down_EFD = self.layer.up(bank), self.layer.down(bank)
        for first, last in segments(bounds, kept_PU.device):
            cut = bounds[first : last + 1]
            part, token_P = slice(cut[0], cut[-1]), self.order.token_P[cut[0] : cut[-1]]
            grad_PD = self.grad_TD[token_P]
            grad_inner_PF = grouped_matmul(grad_PD, down_EFD[first:last].mT, cut)
            if low_rank is not None:
                low_rank.add_inner_gradient(first, last, grad_PD, grad_inner_PF)
            with torch.enable_grad():
                up_PU = kept_PU[cut[0] - bounds[0] : cut[-1] - bounds[0]].detach().requires_grad_()
                inner_PF = self.layer.activation(up_PU)
            self.weight_P[part] = (grad_inner_PF * inner_PF.detach()).sum(-1, dtype=self.weight_P.dtype)
            if bank.down_bias is not None:
                bias_PD = grouped_repeat(bank.down_bias[first:last], cut)
                self.weight_P[part] += (grad_PD * bias_PD).sum(-1, dtype=self.weight_P.dtype)
            # 0 in filling rows: from here on they weigh nothing
            weight_P1 = self.routing_weight_P[part].to(grad_PD.dtype).unsqueeze(-1)
            (grad_up_PU,) = torch.autograd.grad(inner_PF, up_PU, grad_inner_PF.mul_(weight_P1))
            if self.rows_PD is not None:
                grouped_matmul(grad_up_PU, up_EDU[first:last].mT, cut, self.rows_PD[part])
                if low_rank is not None:
                    low_rank.add_row_gradient(first, last, grad_up_PU, self.rows_PD[part])
            if low_rank is not None and inputs_TD is not None:
                low_rank.keep_gradients(
                    first, last, inputs_TD[token_P], grad_up_PU, inner_PF.detach(), grad_PD * weight_P1
                )
            places = [None if grad is None else grad[first:last] for grad in grads]
            if places[0] is not None:
                assert inputs_TD is not None, "a trained bank's forward pass keeps the layer's input"
                grouped_outer(grad_up_PU, inputs_TD[token_P], cut, self._as_stored(places[0]))
            if places[1] is not None:
                grouped_outer(grad_PD * weight_P1, inner_PF.detach(), cut, self._as_stored(places[1]))
            if places[2] is not None:
                grouped_sum(grad_up_PU, cut, places[2])
            if places[3] is not None:
                grouped_sum(grad_PD * weight_P1, cut, places[3])

    def summed_over_slots(self) -> Tensor:
        """Gradient of the layer's input, (T, D)."""
        assert self.rows_PD is not None, "asked for only where the input wants a gradient"
        out_TD = torch.empty_like(self.grad_TD)
        for part in token_chunks(len(out_TD), out_TD.device):
            torch.sum(self.rows_PD[self.order.row_TK[part]], dim=1, out=out_TD[part])
        return out_TD

    def _as_stored(self, grad_E: Tensor) -> Tensor:
        """A weight's gradient as (E, outputs, inputs), whatever its layout."""
        return grad_E.mT if self.layer.is_transposed else grad_E
