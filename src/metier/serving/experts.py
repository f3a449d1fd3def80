"""One expert layer that answers many deltas in one pass: the base's experts, and those that deltas have replaced."""

# T tokens, D hidden_size, K top_k, E experts of the base, N numbers of resident deltas, S slots, G slots in use
# P rows in virtual expert order

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metier.methods.bank_passes import bank_forward
from metier.methods.expert_bank import ExpertBank, ExpertsLayer
from metier.methods.grouped import grouped_matmul, grouped_repeat
from metier.methods.low_rank import LowRankBank, low_rank_experts
from metier.methods.pairs import PairOrder, block_rows, order_pairs, segments
from metier.models.moe import MoELayer
from metier.serving.few_rows import Projection, by_inputs, few_rows_experts
from metier.serving.row_pool import RowPool
from metier.serving.step import Step, current_step

ON_BASE = -1
"""In the table: the expert is the base's own."""


class ServedExperts(nn.Module):
    """Stands in a model for an experts module of transformers' contract, which it keeps as `base_layer`.

    `slot_NE[n, e]` says in which slot of the pool the delta of number n keeps its own expert e, `ON_BASE` where it has
    none. A row of the table is written before its number is given to a request, and is not read after.
    """

    def __init__(self, view: MoELayer, pool: RowPool, most_deltas: int) -> None:
        super().__init__()
        self.base_layer, self.view, self.pool = view.experts, view, pool
        if pool.is_by_inputs and not view.is_transposed:
            for name in (view.parameter_names()[0], "down_proj"):
                parameter = getattr(view.experts, name)
                parameter.data = by_inputs(parameter.data)
        self.device = getattr(view.experts, view.parameter_names()[0]).device
        self.slot_NE = torch.full((most_deltas + 1, view.num_experts), ON_BASE, dtype=torch.int32, device=self.device)
        self.low_rank: dict[int, LowRankBank] = {}
        self._layer = ExpertsLayer(
            _bank({name: getattr(view.experts, name) for name in view.parameter_names()}),
            getattr(view.experts, "_apply_gate" if view.has_gate else "act_fn"),
            view.is_transposed,
            view.experts.get_submodule("post_expert_norm") if view.has_post_expert_norm else None,
        )
        self._slots, self._up_name = _bank(pool.tensors), view.parameter_names()[0]
        self._projections = _projections(self._layer, self._slots) if pool.is_by_inputs else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts contract has it: (T, D), (T, K) int64, (T, K) → (T, D)."""
        step = current_step()
        if step is None:
            out_TD: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return out_TD
        if step.counted_T is not None:
            self._count(step, top_k_index)
        if any(number in self.low_rank for number in step.numbers):
            return self._with_low_rank(step, hidden_states, top_k_index, top_k_weights)
        return self._with_slots(step.numbers, step.number_T, hidden_states, top_k_index, top_k_weights)

    def _with_slots(
        self, numbers: Sequence[int], number_T: Tensor, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        """Deltas that replace experts, and the base."""
        slot_TK = self.slot_NE[number_T.unsqueeze(-1), ids_TK] if numbers else None
        if self._projections is not None:
            return self._by_rows(slot_TK, hidden_TD, ids_TK, weights_TK)
        if slot_TK is None or not (is_own_TK := slot_TK >= 0).any():
            out_TD: Tensor = self.base_layer(hidden_TD, ids_TK, weights_TK)
            return out_TD
        used_G, group_TK = torch.unique(slot_TK, return_inverse=True)
        # the first is ON_BASE, unless every expert of the batch is a delta's own
        shift = 1 if int(used_G[0]) == ON_BASE else 0
        slots = used_G[shift:].tolist()
        num_experts = self.view.num_experts
        virtual_TK = torch.where(is_own_TK, group_TK + (num_experts - shift), ids_TK)
        dtype, device = self._slots.up.dtype, hidden_TD.device
        order = order_pairs(ids_TK, virtual_TK, num_virtual=num_experts + len(slots), block=block_rows(device, dtype))
        inputs_TD = hidden_TD.to(dtype)
        out_PD = inputs_TD.new_empty(len(order.token_P), inputs_TD.shape[-1])
        base, own = order.bounds[: num_experts + 1], order.bounds[num_experts:]
        bank_forward(self._layer, self._layer.base, base, order, inputs_TD, out_PD, keeps=False)
        self._slots_forward(slots, own, order, inputs_TD, out_PD)
        out_TD = hidden_TD.new_empty(hidden_TD.shape)
        order.weighted(out_PD, weights_TK, out_TD)
        return out_TD

    def _by_rows(self, slot_TK: Tensor | None, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same where experts are small."""
        assert self._projections is not None, "asked for where they are"
        up, down = self._projections
        chosen_TK = ids_TK if slot_TK is None else torch.where(slot_TK >= 0, slot_TK + self.view.num_experts, ids_TK)
        norm = self._layer.output_norm
        return few_rows_experts(
            hidden_TD, chosen_TK, weights_TK, up=up, down=down, activation=self._layer.activation, output_norm=norm
        )

    def _slots_forward(
        self, slots: Sequence[int], bounds: tuple[int, ...], order: PairOrder, inputs_TD: Tensor, out_PD: Tensor
    ) -> None:
        """The rows of experts that deltas have replaced: one weight a slot, wherever it lies in the pool."""
        layer, bank = self._layer, self._slots
        for first, last in segments(bounds, inputs_TD.device):
            cut, mine = bounds[first : last + 1], slots[first:last]
            up = self.pool.matrices(self._up_name, mine, is_transposed=layer.is_transposed)
            down = self.pool.matrices("down_proj", mine, is_transposed=layer.is_transposed)
            up_PU = grouped_matmul(inputs_TD.index_select(0, order.token_P[cut[0] : cut[-1]]), up, cut)
            if bank.up_bias is not None:
                up_PU.add_(grouped_repeat(bank.up_bias[mine], cut))
            place_PD = out_PD[cut[0] : cut[-1]]
            grouped_matmul(layer.activation(up_PU), down, cut, place_PD)
            if bank.down_bias is not None:
                place_PD.add_(grouped_repeat(bank.down_bias[mine], cut))
            if layer.output_norm is not None:
                place_PD.copy_(layer.output_norm(place_PD))

    def _with_low_rank(self, step: Step, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Tokens of deltas that change experts by low rank, and then all others."""
        numbers = [number for number in step.numbers if number in self.low_rank]
        bank_N = torch.full((len(self.slot_NE),), len(numbers), dtype=torch.int64)
        bank_N[numbers] = torch.arange(len(numbers))
        bank_T = bank_N.to(self.device)[step.number_T]
        is_low_T = bank_T < len(numbers)
        out_TD = hidden_TD.new_empty(hidden_TD.shape)
        mine, others = is_low_T.nonzero().squeeze(1), (~is_low_T).nonzero().squeeze(1)
        out_TD[mine] = low_rank_experts(
            hidden_TD[mine],
            ids_TK[mine],
            bank_T[mine],
            weights_TK[mine],
            base=self._layer.base,
            banks=tuple(self.low_rank[number] for number in numbers),
            activation=self._layer.activation,
            is_transposed=self._layer.is_transposed,
            output_norm=self._layer.output_norm,
        )
        if len(others):
            rest = [number for number in step.numbers if number not in self.low_rank]
            out_TD[others] = self._with_slots(
                rest, step.number_T[others], hidden_TD[others], ids_TK[others], weights_TK[others]
            )
        return out_TD

    def _count(self, step: Step, ids_TK: Tensor) -> None:
        assert step.counted_T is not None, "asked for where somebody counts"
        is_counted_T = step.counted_T >= 0
        flat = step.counted_T[is_counted_T].unsqueeze(-1) * self.view.num_experts + ids_TK[is_counted_T]
        counts = torch.bincount(flat.flatten(), minlength=step.num_counted * self.view.num_experts)
        step.counts[self.view.index] = counts.view(step.num_counted, self.view.num_experts)


def _bank(tensors: dict[str, Tensor]) -> ExpertBank:
    up = "gate_up_proj" if "gate_up_proj" in tensors else "up_proj"
    return ExpertBank(tensors[up], tensors["down_proj"], tensors.get(f"{up}_bias"), tensors.get("down_proj_bias"))


def _projections(layer: ExpertsLayer, slots: ExpertBank) -> tuple[Projection, Projection]:
    """Up and down, of the base and of the slots, seen as (inputs, outputs)."""
    base, t = layer.base, layer.is_transposed
    up = (base.up, slots.up) if t else (base.up.mT, slots.up.mT)
    down = (base.down, slots.down) if t else (base.down.mT, slots.down.mT)
    return Projection(*up, base.up_bias, slots.up_bias), Projection(*down, base.down_bias, slots.down_bias)
