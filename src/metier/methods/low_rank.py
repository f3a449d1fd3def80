"""Low-rank changes of some of a layer's experts, `W + scale * B A`, as thin products beside the base's own.

Neither the sum nor `B A` is ever formed, and no row of the base is copied. Tokens that use a changed expert are a
second block of rows beside the plain ones, sorted by expert and then by the bank that changes it: so the base's
products run over whole experts, and each bank's thin ones over its part of them.
"""

# T tokens, D hidden_size, F moe_intermediate_size, E experts of the base, K top_k, P rows in expert order
# U = 2F where experts are gated, else F; N banks, C changed experts of a bank, R rank

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metier.methods.bank_passes import ExpertsBackward, bank_forward
from metier.methods.expert_bank import Activation, ExpertBank, ExpertsLayer
from metier.methods.pairs import PairOrder, block_rows, order_pairs


@dataclass(frozen=True, slots=True)
class LowRankBank:
    """Changes of `C` experts, each of its up and its down projection; experts of a lower rank are filled up with 0."""

    expert_ids: tuple[int, ...]
    """Which of the base's experts they change; C of them."""
    scales: tuple[float, ...]
    """What `B A` is multiplied by, expert by expert."""
    up_a: Tensor
    """(C, R, D)"""
    up_b: Tensor
    """(C, U, R)"""
    down_a: Tensor
    """(C, R, F)"""
    down_b: Tensor
    """(C, D, R)"""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (self.up_a, self.up_b, self.down_a, self.down_b)


def low_rank_experts(
    hidden_TD: Tensor,
    expert_ids_TK: Tensor,
    bank_ids_T: Tensor,
    routing_weights_TK: Tensor,
    *,
    base: ExpertBank,
    banks: tuple[LowRankBank, ...],
    activation: Activation,
    is_transposed: bool,
    dropout: float = 0.0,
    output_norm: Activation | None = None,
) -> Tensor:
    """Sum over a token's slots of `routing weight * expert(hidden)`, its bank's changes added to the expert's weights.

    Computes in the dtype of the base; float32 masters are cast for the products and get float32 gradients. Where `B` is
    0, the result is the base's to the bit.

    Args:
        hidden_TD: any float dtype.
        expert_ids_TK: what the router chose, int64.
        bank_ids_T: which of `banks` a token uses, int64; `len(banks)` for none.
        routing_weights_TK: any float dtype; gradients flow to it.
        base: frozen; never gets a gradient.
        banks: any number.
        activation: elementwise over rows, differentiable by autograd.
        is_transposed: layout of the base's weights; the banks' is as documented above for every family.
        output_norm: what the family does to each expert's output before it is weighted, differentiable; frozen.
        dropout: share of each thin product's inputs that is set to 0, the rest being scaled up; 0 where there is none.

    Returns:
        (T, D) in the dtype of `hidden_TD`.

    Paper: LoRA, arXiv:2106.09685, section 4; on selected experts only: MoE-Sieve, arXiv:2603.24044.
    """
    keys_TK = _keys(expert_ids_TK, bank_ids_T, banks, base.up.shape[0])
    seed = int(torch.randint(2**62, (1,))) if dropout else 0
    call = _Call(ExpertsLayer(base, activation, is_transposed, output_norm), banks, dropout, seed)
    flat = tuple(tensor for bank in banks for tensor in bank.tensors())
    out_TD: Tensor = _LowRankExperts.apply(hidden_TD, routing_weights_TK, (expert_ids_TK, keys_TK), call, *flat)
    return out_TD


def _keys(expert_ids_TK: Tensor, bank_ids_T: Tensor, banks: tuple[LowRankBank, ...], num_experts: int) -> Tensor:
    """Sort keys: `expert` where it is plain, else `E + expert * N + bank`."""
    is_changed_NE = torch.zeros(len(banks) + 1, num_experts, dtype=torch.bool, device=expert_ids_TK.device)
    for number, bank in enumerate(banks):
        is_changed_NE[number, list(bank.expert_ids)] = True
    bank_ids_T1 = bank_ids_T.unsqueeze(-1)
    changed_TK = num_experts + expert_ids_TK * len(banks) + bank_ids_T1
    return torch.where(is_changed_NE[bank_ids_T1, expert_ids_TK], changed_TK, expert_ids_TK)


@dataclass(frozen=True, slots=True)
class _Call:
    """What stays the same from the forward pass to the backward pass, tensors that want gradients aside."""

    layer: ExpertsLayer
    banks: tuple[LowRankBank, ...]
    """For their ids and scales."""
    dropout: float
    seed: int
    """Of the dropout's masks, which the backward pass draws again instead of keeping them."""

    @property
    def num_keys(self) -> int:
        return self.layer.base.up.shape[0] * (1 + len(self.banks))

    def bounds(self, order: PairOrder) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where each expert's rows begin and end: among the plain rows, and among the changed."""
        num_experts = self.layer.base.up.shape[0]
        return order.bounds[: num_experts + 1], order.bounds[num_experts :: max(1, len(self.banks))]

    def rows(self, order: PairOrder, flat: tuple[Tensor, ...]) -> LowRankRows:
        """The thin products of one pass, its matrices in the dtype of the base."""
        dtype = self.layer.base.up.dtype
        matrices = [[t.detach().to(dtype) for t in flat[i : i + 4]] for i in range(0, len(flat), 4)]
        return LowRankRows(self, order.bounds[self.layer.base.up.shape[0] :], matrices)


class _LowRankExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weights_TK: Tensor, ids_TK: tuple[Tensor, Tensor], call: _Call, *flat: Tensor
    ) -> Tensor:
        base, device = call.layer.base, hidden_TD.device
        wants_rows, is_trained = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[4:])
        with torch.autocast(device.type, enabled=False):
            order = order_pairs(*ids_TK, num_virtual=call.num_keys, block=block_rows(device, base.up.dtype))
            inputs_TD = hidden_TD.to(base.up.dtype)
            out_PD = inputs_TD.new_empty(len(order.token_P), inputs_TD.shape[-1])
            plain, changed = call.bounds(order)
            plain_PU = bank_forward(call.layer, base, plain, order, inputs_TD, out_PD, keeps=wants_rows)
            low_rank, keeps = call.rows(order, flat), wants_rows or is_trained
            changed_PU = bank_forward(
                call.layer, base, changed, order, inputs_TD, out_PD, keeps=keeps, low_rank=low_rank
            )
            out_TD = hidden_TD.new_empty(hidden_TD.shape)
            order.weighted(out_PD, weights_TK, out_TD)
        ctx.save_for_backward(hidden_TD if is_trained else None, weights_TK, plain_PU, changed_PU, *flat)
        ctx.call, ctx.order, ctx.hidden_dtype = call, order, hidden_TD.dtype
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        call, order = ctx.call, ctx.order
        base, dtype = call.layer.base, call.layer.base.up.dtype
        wants_hidden, wants_weights, _, _, *wants_flat = ctx.needs_input_grad
        hidden_TD, weights_TK, plain_PU, changed_PU, *flat = ctx.saved_tensors
        with torch.autocast(grad_TD.device.type, enabled=False):
            back = ExpertsBackward(call.layer, order, grad_TD.to(dtype), order.spread(weights_TK), wants_hidden)
            plain, changed = call.bounds(order)
            if plain_PU is not None:
                back.run(base, plain, plain_PU, None, [None] * 4)
            low_rank = call.rows(order, tuple(flat))
            if changed_PU is not None:
                inputs_TD = None if hidden_TD is None else hidden_TD.to(dtype)
                back.run(base, changed, changed_PU, inputs_TD, [None] * 4, low_rank)
            grad_hidden_TD = None if back.rows_PD is None else back.summed_over_slots().to(ctx.hidden_dtype)
            grad_weights_TK = order.by_token(back.weight_P) if wants_weights else None
        grads = [grad for bank in low_rank.gradients for grad in bank]
        grads_flat = [g.to(t.dtype) if w else None for g, t, w in zip(grads, flat, wants_flat, strict=True)]
        return grad_hidden_TD, grad_weights_TK, None, None, *grads_flat


class LowRankRows:
    """The thin products over the changed rows of one pass; `expert_bank.LowRank` says what each method is for."""

    def __init__(self, call: _Call, bounds: tuple[int, ...], matrices: list[list[Tensor]]) -> None:
        self.call, self.bounds, self.matrices = call, bounds, matrices
        self.gradients = [[torch.zeros_like(tensor) for tensor in bank] for bank in matrices]
        self._places = [{expert: row for row, expert in enumerate(bank.expert_ids)} for bank in call.banks]

    def add_up(self, first: int, last: int, rows_PD: Tensor, up_PU: Tensor) -> None:
        for part in self._parts(first, last):
            up_a, up_b = self._matrices(part)[:2]
            thin_PR = self._dropped(part, rows_PD[part.rows], "up") @ up_a.T
            up_PU[part.rows].addmm_(thin_PR.mul_(part.scale), up_b.T)

    def add_down(self, first: int, last: int, inner_PF: Tensor, out_PD: Tensor) -> None:
        for part in self._parts(first, last):
            down_a, down_b = self._matrices(part)[2:]
            thin_PR = self._dropped(part, inner_PF[part.rows], "down") @ down_a.T
            out_PD[part.rows].addmm_(thin_PR.mul_(part.scale), down_b.T)

    def add_inner_gradient(self, first: int, last: int, grad_PD: Tensor, grad_inner_PF: Tensor) -> None:
        for part in self._parts(first, last):
            down_a, down_b = self._matrices(part)[2:]
            thin_PR = (grad_PD[part.rows] @ down_b).mul_(part.scale)
            grad_inner_PF[part.rows] += self._dropped(part, thin_PR @ down_a, "down")

    def add_row_gradient(self, first: int, last: int, grad_up_PU: Tensor, grad_rows_PD: Tensor) -> None:
        for part in self._parts(first, last):
            up_a, up_b = self._matrices(part)[:2]
            thin_PR = (grad_up_PU[part.rows] @ up_b).mul_(part.scale)
            grad_rows_PD[part.rows] += self._dropped(part, thin_PR @ up_a, "up")

    def keep_gradients(
        self, first: int, last: int, rows_PD: Tensor, grad_up_PU: Tensor, inner_PF: Tensor, grad_PD: Tensor
    ) -> None:
        """With `y += s * B A x`: `dB = s * dy.T (A x)` and `dA = s * (B.T dy).T x`, for both projections."""
        for part in self._parts(first, last):
            matrices, gradients = self._matrices(part), self.gradients[part.bank]
            for place, (inputs_PI, upstream_PO) in enumerate(((rows_PD, grad_up_PU), (inner_PF, grad_PD))):
                a_RI, b_OR = matrices[2 * place : 2 * place + 2]
                inputs_PI = self._dropped(part, inputs_PI[part.rows], ("up", "down")[place])
                scaled_PO = upstream_PO[part.rows] * part.scale
                gradients[2 * place][part.row] = (scaled_PO @ b_OR).T @ inputs_PI
                gradients[2 * place + 1][part.row] = scaled_PO.T @ (inputs_PI @ a_RI.T)

    def _parts(self, first: int, last: int) -> Iterator[_Part]:
        """The groups of changed rows of the experts `first` to `last - 1` that are not empty."""
        num_banks = len(self.call.banks)
        start = self.bounds[first * num_banks]
        for expert in range(first, last):
            for number, bank in enumerate(self.call.banks):
                key = expert * num_banks + number
                rows = slice(self.bounds[key] - start, self.bounds[key + 1] - start)
                if rows.stop > rows.start:
                    row = self._places[number][expert]
                    yield _Part(number, row, key, rows, bank.scales[row])

    def _matrices(self, part: _Part) -> list[Tensor]:
        return [tensor[part.row] for tensor in self.matrices[part.bank]]

    def _dropped(self, part: _Part, values_PI: Tensor, projection: str) -> Tensor:
        """The values with the part's dropout mask on them: the same mask in the forward and the backward pass."""
        share = self.call.dropout
        if not share:
            return values_PI
        generator = torch.Generator(values_PI.device)
        generator.manual_seed(self.call.seed + 2 * part.key + (projection == "down"))
        kept_PI = torch.rand(values_PI.shape, generator=generator, device=values_PI.device) >= share
        return values_PI * kept_PI / (1 - share)


@dataclass(frozen=True, slots=True)
class _Part:
    """One bank's rows of one expert."""

    bank: int
    row: int
    """The expert's place in the bank."""
    key: int
    rows: slice
    """Within the segment that is worked on."""
    scale: float
