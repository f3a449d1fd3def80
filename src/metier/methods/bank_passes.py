"""One bank's rows through its experts and back: the passes that virtual experts and low-rank changes are made of."""

# T tokens, D hidden_size, F moe_intermediate_size, E experts of a bank, K top_k, P rows in virtual expert order
# U = 2F where experts are gated, else F

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.methods.expert_bank import ExpertBank, ExpertsLayer, LowRank
from metier.methods.grouped import grouped_matmul, grouped_outer, grouped_repeat, grouped_sum
from metier.methods.pairs import PairOrder, segments


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
    kept_PU = inputs_TD.new_empty(bounds[-1] - bounds[0], layer.up_size(bank)) if keeps else None
    for first, last in segments(bounds, inputs_TD.device):
        cut = bounds[first : last + 1]
        rows_PD = inputs_TD.index_select(0, order.token_P[cut[0] : cut[-1]])
        place_PU = None if kept_PU is None else kept_PU[cut[0] - bounds[0] : cut[-1] - bounds[0]]
        up_PU = grouped_matmul(rows_PD, layer.up(bank, first, last, cut), cut, place_PU)
        if bank.up_bias is not None:
            up_PU.add_(grouped_repeat(bank.up_bias[first:last], cut))
        if low_rank is not None:
            low_rank.add_up(first, last, rows_PD, up_PU)
        place_PD = out_PD[cut[0] : cut[-1]]
        project_down(layer, bank, first, last, cut, layer.activation(up_PU), place_PD, low_rank)
        if layer.output_norm is not None:
            place_PD.copy_(layer.output_norm(place_PD))
    return kept_PU


def project_down(
    layer: ExpertsLayer,
    bank: ExpertBank,
    first: int,
    last: int,
    cut: tuple[int, ...],
    inner_PF: Tensor,
    out_PD: Tensor,
    low_rank: LowRank | None,
) -> None:
    """The down projection of the experts `first` to `last - 1`, written to `out_PD`."""
    grouped_matmul(inner_PF, layer.down(bank, first, last, cut), cut, out_PD)
    if low_rank is not None:
        low_rank.add_down(first, last, inner_PF, out_PD)
    if bank.down_bias is not None:
        out_PD.add_(grouped_repeat(bank.down_bias[first:last], cut))


@dataclass(frozen=True, slots=True)
class _Group:
    """The experts of a bank that are worked on at once, and where their rows are."""

    bank: ExpertBank
    first: int
    last: int
    cut: tuple[int, ...]
    part: slice
    low_rank: LowRank | None


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
        """Write one bank's part; `grads` are places for those of `up, down, up_bias, down_bias` that are wanted."""
        wants_out = grads[1] is not None or grads[3] is not None or (low_rank is not None and inputs_TD is not None)
        for first, last in segments(bounds, kept_PU.device):
            cut = bounds[first : last + 1]
            part, token_P = slice(cut[0], cut[-1]), self.order.token_P[cut[0] : cut[-1]]
            with torch.enable_grad():
                up_PU = kept_PU[cut[0] - bounds[0] : cut[-1] - bounds[0]].detach().requires_grad_()
                inner_PF = self.layer.activation(up_PU)
            group = _Group(bank, first, last, cut, part, low_rank)
            through_down = self._through_norm_and_down if self.layer.output_norm else self._through_down
            grad_inner_PF, grad_out_PD = through_down(
                group, self.grad_TD.index_select(0, token_P), inner_PF.detach(), wants_out
            )
            (grad_up_PU,) = torch.autograd.grad(inner_PF, up_PU, grad_inner_PF)
            if self.rows_PD is not None:
                grouped_matmul(grad_up_PU, self.layer.up_back(bank, first, last, cut), cut, self.rows_PD[part])
                if low_rank is not None:
                    low_rank.add_row_gradient(first, last, grad_up_PU, self.rows_PD[part])
            if inputs_TD is not None and low_rank is not None and grad_out_PD is not None:
                low_rank.keep_gradients(
                    first, last, inputs_TD.index_select(0, token_P), grad_up_PU, inner_PF.detach(), grad_out_PD
                )
            places = [None if grad is None else grad[first:last] for grad in grads]
            if places[0] is not None:
                assert inputs_TD is not None, "a trained bank's forward pass keeps the layer's input"
                grouped_outer(grad_up_PU, inputs_TD.index_select(0, token_P), cut, self._as_stored(places[0]))
            if places[1] is not None and grad_out_PD is not None:
                grouped_outer(grad_out_PD, inner_PF.detach(), cut, self._as_stored(places[1]))
            if places[2] is not None:
                grouped_sum(grad_up_PU, cut, places[2])
            if places[3] is not None and grad_out_PD is not None:
                grouped_sum(grad_out_PD, cut, places[3])

    def _through_down(
        self, group: _Group, grad_PD: Tensor, inner_PF: Tensor, wants_out: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the down projection's input and, if wanted, of its output; both with the routing weights in.

        With `out = W inner + b` the routing weight's gradient is `<grad, out> = <W.T grad, inner> + <grad, b>`, and
        `W.T grad` is wanted anyway: so the down projection's output is neither kept nor computed again.
        """
        grad_inner_PF = self._inner_gradient(group, grad_PD)
        self.weight_P[group.part] = (grad_inner_PF * inner_PF).sum(-1, dtype=self.weight_P.dtype)
        if group.bank.down_bias is not None:
            bias_PD = grouped_repeat(group.bank.down_bias[group.first : group.last], group.cut)
            self.weight_P[group.part] += (grad_PD * bias_PD).sum(-1, dtype=self.weight_P.dtype)
        weight_P1 = self._weights(group, grad_PD)
        return grad_inner_PF.mul_(weight_P1), grad_PD * weight_P1 if wants_out else None

    def _through_norm_and_down(
        self, group: _Group, grad_PD: Tensor, inner_PF: Tensor, wants_out: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same where every expert's output is normalised: what went into the norm is computed again."""
        assert self.layer.output_norm is not None, "asked for only where there is one"
        out_PD = torch.empty_like(grad_PD)
        project_down(self.layer, group.bank, group.first, group.last, group.cut, inner_PF, out_PD, group.low_rank)
        with torch.enable_grad():
            out_PD = out_PD.requires_grad_()
            normed_PD = self.layer.output_norm(out_PD)
        self.weight_P[group.part] = (grad_PD * normed_PD.detach()).sum(-1, dtype=self.weight_P.dtype)
        (grad_out_PD,) = torch.autograd.grad(normed_PD, out_PD, grad_PD * self._weights(group, grad_PD))
        return self._inner_gradient(group, grad_out_PD), grad_out_PD

    def _inner_gradient(self, group: _Group, grad_PD: Tensor) -> Tensor:
        down_back = self.layer.down_back(group.bank, group.first, group.last, group.cut)
        grad_inner_PF = grouped_matmul(grad_PD, down_back, group.cut)
        if group.low_rank is not None:
            group.low_rank.add_inner_gradient(group.first, group.last, grad_PD, grad_inner_PF)
        return grad_inner_PF

    def _weights(self, group: _Group, like: Tensor) -> Tensor:
        """The rows' routing weights, (P, 1): 0 in filling rows, so that from here on they weigh nothing."""
        return self.routing_weight_P[group.part].to(like.dtype).unsqueeze(-1)

    def summed_over_slots(self) -> Tensor:
        """Gradient of the layer's input, (T, D)."""
        assert self.rows_PD is not None, "asked for only where the input wants a gradient"
        return self.order.summed(self.rows_PD)

    def _as_stored(self, grad_E: Tensor) -> Tensor:
        """A weight's gradient as (E, outputs, inputs), whatever its layout."""
        return grad_E.mT if self.layer.is_transposed else grad_E
