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

from typing import Any

import torch
from torch import Tensor

from metier.methods.bank_passes import ExpertsBackward, bank_forward
from metier.methods.expert_bank import Activation, ExpertBank, ExpertsLayer
from metier.methods.pairs import block_rows, order_pairs

__all__ = ["Activation", "ExpertBank", "virtual_experts"]


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
    output_norm: Activation | None = None,
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
        output_norm: what the family does to each expert's output before it is weighted, differentiable; frozen.

    Returns:
        (T, D) in the dtype of `hidden_TD`.
    """
    flat = tuple(tensor for delta in deltas for tensor in delta.tensors())
    layer = ExpertsLayer(base, activation, is_transposed, output_norm)
    out_TD: Tensor = _VirtualExperts.apply(hidden_TD, routing_weights_TK, (expert_ids_TK, virtual_ids_TK), layer, *flat)
    return out_TD


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
            order.weighted(out_PD, weights_TK, out_TD)
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
            grad_weights_TK = order.by_token(back.weight_P) if wants_weights else None
        grads_flat = [None if g is None else g.to(t.dtype) for g, t in zip(grads_flat, flat, strict=True)]
        return grad_hidden_TD, grad_weights_TK, None, None, *grads_flat
