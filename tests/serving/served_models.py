"""Tiny models with made-up deltas put into service by hand, and the same deltas merged: what serving is compared with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier.methods.low_rank import LowRankBank
from metier.models.moe import MoELayer, moe_layers
from metier.serving.experts import ServedExperts
from metier.serving.row_pool import RowPool
from tiny_models import tiny_model

NUM_SLOTS, MOST_DELTAS = 64, 8


@dataclass
class Served:
    """A model in service, and a plain one of the same weights."""

    model: PreTrainedModel
    plain: PreTrainedModel
    layers: list[ServedExperts]
    pool: RowPool
    merged: dict[int, PreTrainedModel] = field(default_factory=dict)
    """By a delta's number: the base with the delta's rows written over its own."""

    def add_rows(self, number: int, experts: dict[int, list[int]], *, seed: int) -> None:
        """A delta that replaces experts: `experts` by decoder layer."""
        torch.manual_seed(seed)
        merged = copy.deepcopy(self.plain)
        views = {view.index: view for view in moe_layers(merged)}
        for layer in self.layers:
            ids = experts.get(layer.view.index, [])
            for expert, slot in zip(ids, self.pool.take(len(ids)), strict=True):
                for name in layer.view.parameter_names():
                    weight = getattr(views[layer.view.index].experts, name)
                    row = weight.detach()[expert] + torch.randn_like(weight[expert]) / 4
                    weight.data[expert] = row
                    self.pool.write(slot, name, row)
                layer.slot_NE[number, expert] = slot
        self.merged[number] = merged

    def add_low_rank(self, number: int, experts: dict[int, list[int]], *, seed: int, rank: int = 2) -> None:
        """A delta that changes experts by low rank."""
        torch.manual_seed(seed)
        merged = copy.deepcopy(self.plain)
        views = {view.index: view for view in moe_layers(merged)}
        for layer in self.layers:
            ids = experts.get(layer.view.index, [])
            if not ids:
                continue
            bank = _random_low_rank(layer.view, ids, rank)
            layer.low_rank[number] = bank
            _merge_low_rank(views[layer.view.index], bank)
        self.merged[number] = merged


def served(family: str = "deepseek_v2", **changes: object) -> Served:
    model = tiny_model(family, **changes).eval()
    plain = copy.deepcopy(model)
    views = moe_layers(model)
    first = views[0]
    shapes = {name: tuple(getattr(first.experts, name).shape[1:]) for name in first.parameter_names()}
    pool = RowPool(shapes, NUM_SLOTS, dtype=torch.float32, is_transposed=first.is_transposed)
    layers = []
    for view in views:
        parent, _, name = view.path.rpartition(".")
        layer = ServedExperts(view, pool, MOST_DELTAS)
        setattr(model.get_submodule(parent), name, layer)
        layers.append(layer)
    return Served(model, plain, layers, pool)


def _random_low_rank(view: MoELayer, ids: list[int], rank: int) -> LowRankBank:
    up_size = view.moe_intermediate_size * (2 if view.has_gate else 1)
    return LowRankBank(
        tuple(ids),
        (0.7,) * len(ids),
        torch.randn(len(ids), rank, view.hidden_size) / 4,
        torch.randn(len(ids), up_size, rank) / 4,
        torch.randn(len(ids), rank, view.moe_intermediate_size) / 4,
        torch.randn(len(ids), view.hidden_size, rank) / 4,
    )


def _merge_low_rank(view: MoELayer, bank: LowRankBank) -> None:
    up = view.parameter_names()[0]
    for place, expert in enumerate(bank.expert_ids):
        for name, a, b in ((up, bank.up_a, bank.up_b), ("down_proj", bank.down_a, bank.down_b)):
            change = bank.scales[place] * b[place] @ a[place]
            weight: Tensor = getattr(view.experts, name).data
            weight[expert] += change.T if view.is_transposed else change


def logits(model: nn.Module, token_ids: list[int]) -> Tensor:
    """(T, V) of one sequence alone."""
    with torch.no_grad():
        out: Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return out
