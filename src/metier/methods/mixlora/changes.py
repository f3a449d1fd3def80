"""What LoRA experts change in a dense block: thin products over (token, slot) pairs beside one base product a token.

An expert's inner state is `between(up(x) + s B A x, …)`. The base's `up(x)` is the same for all experts, so it comes in
once for each token; and the base's down projection is linear, so it goes once over the weighted sum of inner states.
Autograd gets no row of a pair: the backward pass makes them again from `x`, `up(x)` and the thin matrices.
"""

# T tokens, D hidden_size, U width of an up projection, F inner width, N up projections, E experts, K top_k, R rank,
# P rows of one expert

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metier.methods.pairs import PairOrder, order_pairs

Between = Callable[..., Tensor]
"""N times (P, U) → (P, F), row by row, differentiable."""

TENSORS_OF_AN_EXPERT = 4


@dataclass(frozen=True, slots=True)
class LoraExpert:
    """One expert's matrices."""

    up_a: Tensor
    """(N, R, D)"""
    up_b: Tensor
    """(N, U, R)"""
    down_a: Tensor
    """(R, F)"""
    down_b: Tensor
    """(D, R)"""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (self.up_a, self.up_b, self.down_a, self.down_b)


def changes(
    hidden_TD: Tensor,
    expert_ids_TK: Tensor,
    routing_weights_TK: Tensor,
    ups_TU: Sequence[Tensor],
    inner_TF: Tensor,
    *,
    experts: Sequence[LoraExpert],
    between: Between,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What the experts add to the base's inner state and to its output.

        inner  += sum_k w_k (inner_k - inner)
        output += sum_k w_k s B_down A_down inner_k

    Both are exactly 0 where every B is 0. Computes in the dtype of `ups_TU`; float32 masters get float32 gradients.

    Args:
        hidden_TD: the block's input.
        expert_ids_TK: what the router chose, int64, each at most once a token.
        routing_weights_TK: any float dtype; gradients flow to it.
        ups_TU: the base's up projections of `hidden_TD`, one or two; gradients flow to them.
        inner_TF: `between(*ups_TU)`; gradients flow to it.
        experts: E of them; gradients go to those tensors that want them.
        between: what lies between the projections.
        scale: s.

    Returns:
        (T, F) and (T, D), in the dtype of `ups_TU`.
    """
    flat = tuple(tensor for expert in experts for tensor in expert.tensors())
    call = _Call(between, scale, len(ups_TU), len(experts))
    added: tuple[Tensor, Tensor] = _Changes.apply(
        call, expert_ids_TK, hidden_TD, routing_weights_TK, inner_TF, *ups_TU, *flat
    )
    return added


@dataclass(frozen=True, slots=True)
class _Call:
    between: Between
    scale: float
    num_ups: int
    num_experts: int

    def experts(self, flat: Sequence[Tensor], dtype: torch.dtype) -> list[LoraExpert]:
        step = TENSORS_OF_AN_EXPERT
        return [LoraExpert(*(t.detach().to(dtype) for t in flat[i : i + step])) for i in range(0, len(flat), step)]

    def changed_ups(self, expert: LoraExpert, rows_PD: Tensor, ups_PU: Sequence[Tensor]) -> list[Tensor]:
        """N times (P, U): the base's, and the expert's thin products added."""
        pairs = zip(ups_PU, expert.up_a, expert.up_b, strict=True)
        return [torch.addmm(up_PU, rows_PD @ a_RD.T, b_UR.T, alpha=self.scale) for up_PU, a_RD, b_UR in pairs]


class _Changes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, ids_TK: Tensor, hidden_TD: Tensor, weights_TK: Tensor, inner_TF: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        ups_TU, flat = rest[: call.num_ups], rest[call.num_ups :]
        dtype = inner_TF.dtype
        with torch.autocast(hidden_TD.device.type, enabled=False):
            order = order_pairs(ids_TK, ids_TK, num_virtual=call.num_experts, block=1)
            rows_TD, weight_S = hidden_TD.to(dtype), order.spread(weights_TK).to(dtype)
            added_inner_TF = torch.zeros_like(inner_TF)
            added_TD = rows_TD.new_zeros(hidden_TD.shape)
            for matrices, span in zip(call.experts(flat, dtype), _spans(order), strict=True):
                if span.stop == span.start:
                    continue
                token_P, weight_P1 = order.token_P[span], weight_S[span, None]
                base_PU = [up_TU.index_select(0, token_P) for up_TU in ups_TU]
                inner_PF = call.between(*call.changed_ups(matrices, rows_TD.index_select(0, token_P), base_PU))
                # of the same rows in the same place: an activation's last bit depends on where a number lies
                change_PF = inner_PF - call.between(*base_PU)
                thin_PR = (inner_PF @ matrices.down_a.T).mul_(call.scale)
                # a token has an expert once, so no two rows are added in one place
                added_TD.index_add_(0, token_P, (thin_PR @ matrices.down_b.T).mul_(weight_P1))
                added_inner_TF.index_add_(0, token_P, change_PF.mul_(weight_P1))
        ctx.save_for_backward(hidden_TD, weights_TK, *ups_TU, *flat)
        ctx.call, ctx.order = call, order
        return added_inner_TF, added_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_inner_TF: Tensor, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        call, order = ctx.call, ctx.order
        hidden_TD, weights_TK, *rest = ctx.saved_tensors
        back = _Backward(call, order, hidden_TD, weights_TK, rest, grad_inner_TF, grad_TD)
        wanted = ctx.needs_input_grad[5 + call.num_ups :]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for expert, span in enumerate(_spans(order)):
                if span.stop > span.start:
                    first = expert * TENSORS_OF_AN_EXPERT
                    back.run(expert, span, wants_matrices=any(wanted[first : first + TENSORS_OF_AN_EXPERT]))
        # the base's own inner state is taken away as often as the weights say
        grad_base_TF = grad_inner_TF * -weights_TK.sum(-1, keepdim=True).to(grad_inner_TF.dtype)
        grad_weights_TK = order.by_token(back.weight_S).to(weights_TK.dtype)
        grads_flat = [
            grad.to(tensor.dtype) if wants else None
            for grad, tensor, wants in zip(back.matrices(), rest[call.num_ups :], wanted, strict=True)
        ]
        return None, None, back.rows_TD.to(hidden_TD.dtype), grad_weights_TK, grad_base_TF, *back.ups_TU, *grads_flat


class _Backward:
    """The gradients of one pass, collected expert by expert."""

    def __init__(
        self,
        call: _Call,
        order: PairOrder,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        rest: Sequence[Tensor],
        grad_inner_TF: Tensor,
        grad_TD: Tensor,
    ) -> None:
        self.call, self.order, self.grad_inner_TF, self.grad_TD = call, order, grad_inner_TF, grad_TD
        dtype = grad_inner_TF.dtype
        self._ups_TU = rest[: call.num_ups]
        self._experts = call.experts(rest[call.num_ups :], dtype)
        self._hidden_TD, self._weight_S = hidden_TD.to(dtype), order.spread(weights_TK).to(dtype)
        self.rows_TD = torch.zeros_like(self._hidden_TD)
        self.ups_TU = [torch.zeros_like(up_TU) for up_TU in self._ups_TU]
        self.weight_S = torch.zeros_like(self._weight_S)
        self._matrices: dict[int, LoraExpert] = {}

    def run(self, number: int, span: slice, *, wants_matrices: bool) -> None:
        """One expert's rows."""
        expert, scale = self._experts[number], self.call.scale
        token_P, weight_P1 = self.order.token_P[span], self._weight_S[span, None]
        rows_PD, grad_inner_PF, grad_PD = (
            x.index_select(0, token_P) for x in (self._hidden_TD, self.grad_inner_TF, self.grad_TD)
        )
        base_PU = [up_TU.index_select(0, token_P) for up_TU in self._ups_TU]
        with torch.enable_grad():
            ups_PU = [x.requires_grad_() for x in self.call.changed_ups(expert, rows_PD, base_PU)]
            inner_PF = self.call.between(*ups_PU)
        values_PF, thin_PR = inner_PF.detach(), grad_PD @ expert.down_b
        of_weight_PF = grad_inner_PF * (values_PF - self.call.between(*base_PU))
        down_PR = values_PF @ expert.down_a.T
        self.weight_S[span] = of_weight_PF.sum(-1) + scale * (thin_PR * down_PR).sum(-1)
        thin_PR = thin_PR.mul_(weight_P1).mul_(scale)
        grad_ups_PU = torch.autograd.grad(inner_PF, ups_PU, grad_inner_PF * weight_P1 + thin_PR @ expert.down_a)
        for place_TU, grad_PU in zip(self.ups_TU, grad_ups_PU, strict=True):
            place_TU.index_add_(0, token_P, grad_PU)
        thins_PR = [scale * (grad_PU @ b_UR) for grad_PU, b_UR in zip(grad_ups_PU, expert.up_b, strict=True)]
        for thin, a_RD in zip(thins_PR, expert.up_a, strict=True):
            self.rows_TD.index_add_(0, token_P, thin @ a_RD)
        if wants_matrices:
            up_b = [scale * (g.T @ (rows_PD @ a.T)) for g, a in zip(grad_ups_PU, expert.up_a, strict=True)]
            self._matrices[number] = LoraExpert(
                up_a=torch.stack([thin.T @ rows_PD for thin in thins_PR]),
                up_b=torch.stack(up_b),
                down_a=thin_PR.T @ values_PF,
                down_b=scale * ((grad_PD * weight_P1).T @ down_PR),
            )

    def matrices(self) -> Iterator[Tensor]:
        """Gradients of every expert's matrices, 0 where it had no rows or none were wanted."""
        for number, expert in enumerate(self._experts):
            found = self._matrices.get(number)
            yield from found.tensors() if found else (torch.zeros_like(tensor) for tensor in expert.tensors())


def _spans(order: PairOrder) -> list[slice]:
    """Where each expert's rows lie."""
    return [slice(first, last) for first, last in pairwise(order.bounds)]
