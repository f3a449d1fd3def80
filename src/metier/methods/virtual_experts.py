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
from typing import Any

import torch
from torch import Tensor

from metier.methods.grouped import grouped_matmul, grouped_outer, grouped_repeat, grouped_sum
from metier.methods.pairs import PairOrder, block_rows, order_pairs

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
    layer = _Layer(base, activation, is_transposed)
    out_TD: Tensor = _VirtualExperts.apply(hidden_TD, routing_weights_TK, (expert_ids_TK, virtual_ids_TK), layer, *flat)
    return out_TD


@dataclass(frozen=True, slots=True)
class _Layer:
    base: ExpertBank
    activation: Activation
    is_transposed: bool

    def up(self, bank: ExpertBank) -> Tensor:
        """(E, D, U)"""
        return bank.up if self.is_transposed else bank.up.mT

    def down(self, bank: ExpertBank) -> Tensor:
        """(E, F, D)"""
        return bank.down if self.is_transposed else bank.down.mT

    def in_layout(self, grad_EOI: Tensor) -> Tensor:
        return grad_EOI.mT if self.is_transposed else grad_EOI


def _unflatten(flat: tuple[Tensor | None, ...]) -> list[ExpertBank]:
    return [ExpertBank(*flat[i : i + 4]) for i in range(0, len(flat), 4)]  # type: ignore[arg-type]


def _bank_bounds(order: PairOrder, banks: list[ExpertBank]) -> list[tuple[int, ...]]:
    """For each bank the part of `order.bounds` that is its own."""
    ends = list(accumulate((bank.up.shape[0] for bank in banks), initial=0))
    return [order.bounds[ends[i] : ends[i + 1] + 1] for i in range(len(banks))]


class _VirtualExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        ids_TK: tuple[Tensor, Tensor],
        layer: _Layer,
        *flat: Tensor | None,
    ) -> Tensor:
        dtype, device = layer.base.up.dtype, hidden_TD.device
        with torch.autocast(device.type, enabled=False):
            banks = [layer.base, *(delta.to(dtype) for delta in _unflatten(flat))]
            num_virtual = sum(bank.up.shape[0] for bank in banks)
            order = order_pairs(*ids_TK, num_virtual=num_virtual, block=block_rows(device, dtype))
            rows_PD = hidden_TD.to(dtype)[order.token_P]
            out_PD, kept = torch.empty_like(rows_PD), []
            for bank, bounds in zip(banks, _bank_bounds(order, banks), strict=True):
                part = slice(bounds[0], bounds[-1])
                up_PU = _linear(rows_PD[part], layer.up(bank), bank.up_bias, bounds)
                out_PD[part] = _linear(layer.activation(up_PU), layer.down(bank), bank.down_bias, bounds)
                kept.append(up_PU)
            out_TD = (out_PD[order.row_TK] * weights_TK.unsqueeze(-1)).sum(1).to(hidden_TD.dtype)
        is_trained = any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(hidden_TD if is_trained else None, weights_TK, *kept, *flat)
        ctx.layer, ctx.order = layer, order
        ctx.hidden_dtype = hidden_TD.dtype
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        layer, order = ctx.layer, ctx.order
        wants_hidden, wants_weights, _, _, *wants_flat = ctx.needs_input_grad
        hidden_TD, weights_TK, *saved = ctx.saved_tensors
        dtype = layer.base.up.dtype
        num_banks = 1 + len(wants_flat) // 4
        kept, flat = saved[:num_banks], tuple(saved[num_banks:])
        with torch.autocast(grad_TD.device.type, enabled=False):
            banks = [layer.base, *(delta.to(dtype) for delta in _unflatten(flat))]
            weight_P = order.spread(weights_TK)
            grad_rows_PD = (
                grad_TD.new_empty(len(order.token_P), grad_TD.shape[-1], dtype=dtype) if wants_hidden else None
            )
            grad_weight_P = torch.zeros_like(weight_P)
            grads_flat: list[Tensor | None] = []
            for number, (bank, bounds) in enumerate(zip(banks, _bank_bounds(order, banks), strict=True)):
                wanted = wants_flat[4 * (number - 1) : 4 * number] if number else []
                back = _BankBackward(layer, bank, bounds, order, kept[number])
                if wants_hidden or wants_weights or any(wanted):
                    back.run(grad_TD, weight_P, grad_weight_P, grad_rows_PD)
                if number:
                    grads_flat += back.bank_grads(hidden_TD, wanted)
            grad_hidden_TD = None
            if grad_rows_PD is not None:
                grad_hidden_TD = grad_rows_PD[order.row_TK].sum(1).to(ctx.hidden_dtype)
            grad_weights_TK = grad_weight_P[order.row_TK] if wants_weights else None
        grads_flat = [None if g is None else g.to(t.dtype) for g, t in zip(grads_flat, flat, strict=True)]
        return grad_hidden_TD, grad_weights_TK, None, None, *grads_flat


class _BankBackward:
    """One bank's part of the backward pass."""

    def __init__(
        self, layer: _Layer, bank: ExpertBank, bounds: tuple[int, ...], order: PairOrder, up_PU: Tensor
    ) -> None:
        self.layer, self.bank, self.bounds, self.order, self.up_PU = layer, bank, bounds, order, up_PU
        self.part = slice(bounds[0], bounds[-1])
        self.inner_PF = self.grad_out_PD = self.grad_up_PU = up_PU.new_empty(0)

    def run(self, grad_TD: Tensor, weight_P: Tensor, grad_weight_P: Tensor, grad_rows_PD: Tensor | None) -> None:
        """Gradients of the routing weights and of the rows, written to their places.

        With `out = W inner + b` the routing weight's gradient is `<grad, out> = <W.T grad, inner> + <grad, b>`, and
        `W.T grad` is wanted anyway: so the down projection's output is neither kept nor computed again.
        """
        grad_PD = grad_TD.to(self.up_PU.dtype)[self.order.token_P[self.part]]
        grad_inner_PF = grouped_matmul(grad_PD, self.layer.down(self.bank).mT, self.bounds)
        with torch.enable_grad():
            up_PU = self.up_PU.detach().requires_grad_()
            inner_PF = self.layer.activation(up_PU)
        self.inner_PF = inner_PF.detach()
        grad_weight_P[self.part] = (grad_inner_PF * self.inner_PF).sum(-1, dtype=grad_weight_P.dtype)
        if self.bank.down_bias is not None:
            bias_PD = grouped_repeat(self.bank.down_bias, self.bounds)
            grad_weight_P[self.part] += (grad_PD * bias_PD).sum(-1, dtype=grad_weight_P.dtype)
        # 0 in filling rows: from here on they weigh nothing
        weight_P1 = weight_P[self.part].to(grad_PD.dtype).unsqueeze(-1)
        (self.grad_up_PU,) = torch.autograd.grad(inner_PF, up_PU, grad_inner_PF * weight_P1)
        self.grad_out_PD = grad_PD * weight_P1
        if grad_rows_PD is not None:
            grad_rows_PD[self.part] = grouped_matmul(self.grad_up_PU, self.layer.up(self.bank).mT, self.bounds)

    def bank_grads(self, hidden_TD: Tensor | None, wanted: list[bool]) -> list[Tensor | None]:
        """Gradients of `up, down, up_bias, down_bias`, None where not wanted."""
        grads: list[Tensor | None] = [None] * 4
        if wanted[0]:
            assert hidden_TD is not None, "a trained bank's forward pass keeps the layer's input"
            rows_PD = hidden_TD.to(self.grad_up_PU.dtype)[self.order.token_P[self.part]]
            grads[0] = self.layer.in_layout(grouped_outer(self.grad_up_PU, rows_PD, self.bounds))
        if wanted[1]:
            grads[1] = self.layer.in_layout(grouped_outer(self.grad_out_PD, self.inner_PF, self.bounds))
        if wanted[2]:
            grads[2] = grouped_sum(self.grad_up_PU, self.bounds)
        if wanted[3]:
            grads[3] = grouped_sum(self.grad_out_PD, self.bounds)
        return grads


def _linear(rows_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, bounds: tuple[int, ...]) -> Tensor:
    out_PO = grouped_matmul(rows_PI, weight_EIO, bounds)
    return out_PO if bias_EO is None else out_PO.add_(grouped_repeat(bias_EO, bounds))
