"""Rows on disk under a small budget of memory: given up and fetched again all the time, they train to the same bits."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from metier.memory import RowAdamW, clip_grad_norm_, row_store
from metier.memory.disk_cache import DiskCache
from metier.methods.meft import MeftConfig, MeftLayer

PIECE = 8 * 2 * 128 * 4


@pytest.fixture
def small_cache(monkeypatch) -> DiskCache:
    """Room for six Key-Experts, of 16 in each of three layers and as many moments and gradients."""
    monkeypatch.setattr("metier.memory.disk_cache.BATCH_BYTES", 0)
    cache = DiskCache(most_bytes=6 * PIECE)
    monkeypatch.setattr(row_store, "disk_cache", lambda: cache)
    return cache


def train(tier: str, mode: str) -> tuple[list[torch.Tensor], list[MeftLayer]]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    )
    model = peft.get_peft_model(base, MeftConfig(r=128, num_key_experts=16, num_active_key_experts=4, store=tier))
    optimizer = RowAdamW(model.parameters(), lr=1e-2, mode=mode)
    for step in range(4):
        for micro in range(2):
            ids = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(2 * step + micro))
            model(input_ids=ids, labels=ids).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
    optimizer.state_dict()
    layers = [module for module in model.modules() if isinstance(module, MeftLayer)]
    return [array for layer in layers for array in layer.stores["default"].arrays.values()], layers


@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_training_under_a_small_budget_gives_the_bits_of_training_in_memory(mode, small_cache, monkeypatch):
    dropped = []
    make_room = small_cache._make_room

    def counted() -> None:
        before = small_cache.num_bytes
        make_room()
        dropped.append(before - small_cache.num_bytes)

    monkeypatch.setattr(small_cache, "_make_room", counted)
    expected, _ = train("host", mode)
    assert not dropped
    got, layers = train("disk", mode)
    assert sum(dropped) > 50 * PIECE
    assert len(got) == len(expected) == 3 * 4
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [layer.stores["default"].layer_place for layer in layers] == [(0, 3), (1, 3), (2, 3)]


def test_gradients_of_rows_on_disk_are_on_disk_and_forgotten_after_the_step(small_cache):
    _, layers = train("disk", "lazy")
    store = layers[1].stores["default"]
    folder = store._folder
    assert (folder / f"{store.name}.gradients").stat().st_size == 16 * PIECE
    holder = layers[1].meft_gradients["default"]
    assert holder.grad is None
    layers[1](torch.randn(1, 5, 128))  # the next step begins
    small_cache._reader.submit(lambda: None).result()
    assert holder.step_gradients.block_ids == []
    assert not any(file.kind == "gradients" and file.layer is store and file.last_call for file in small_cache._files)
