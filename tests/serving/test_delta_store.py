"""Deltas from their files to where the layers find them, and away again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from metier.deltas.probe import largest_difference
from metier.errors import CorruptDeltaError, ServingError, VerificationError
from metier.models.load import LoadedModel
from metier.models.moe import moe_layers
from metier.serving import delta_store
from metier.serving.delta_source import read_served_delta
from metier.serving.delta_store import DeltaStore
from metier.serving.model_facts import ModelFacts, model_facts
from metier.serving.self_test import self_test
from metier.serving.served_delta import ServedDelta
from metier.serving.step import make_step, running
from serving.delta_folders import KINDS, base_in, esft_in, lora_in, merged

PROMPT = [5, 9, 12, 7, 40, 41]
# float32: the same sums in another order
TOLERANCE = 1e-4


class Ready:
    """A base that deltas can be placed on."""

    def __init__(self, folder: Path, *, family: str = "mixtral", most_deltas: int = 4, **changes: object) -> None:
        self.loaded: LoadedModel = base_in(folder, family, **changes)
        self.plain = base_in(folder / "again", family, **changes)
        self.facts: ModelFacts = model_facts(self.loaded.model, "tiny")
        self.loaded.model.eval()
        layers = moe_layers(self.loaded.model)
        self.store = DeltaStore(self.loaded.model, layers, accelerator_bytes=1 << 20, most_deltas=most_deltas)

    def read(self, folder: Path) -> ServedDelta:
        return read_served_delta(folder, facts=self.facts)

    def logits(self, number: int) -> Tensor:
        with torch.no_grad(), running(make_step([(number, len(PROMPT))])):
            out: Tensor = self.loaded.model(torch.tensor([PROMPT]), use_cache=False).logits
        return out


def merged_logits(ready: Ready, folder: Path) -> Tensor:
    with torch.no_grad():
        out: Tensor = merged(ready.plain, folder)(torch.tensor([PROMPT]), use_cache=False).logits
    return out


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["esft", "expert_lora"])
def test_a_placed_delta_of_experts_says_what_its_merged_model_says(family: str, kind: str, tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base", family=family)
    folder = KINDS[kind](tmp_path / "delta", ready.plain)
    placed = ready.store.place(ready.read(folder))
    want = merged_logits(ready, folder)
    assert largest_difference(ready.logits(placed.number), want) < TOLERANCE
    assert largest_difference(ready.logits(0), want) > 100 * TOLERANCE


def test_a_placed_lora_says_what_its_merged_model_says(tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base")
    folder = KINDS["lora"](tmp_path / "delta", ready.plain)
    placed = ready.store.place(ready.read(folder))
    want = merged_logits(ready, folder)
    assert largest_difference(ready.logits(placed.number), want) < TOLERANCE
    assert largest_difference(ready.logits(0), want) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_delta_leaves_nothing_and_its_number_is_used_again(kind: str, tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base", most_deltas=1)
    delta = ready.read(KINDS[kind](tmp_path / "delta", ready.plain))
    base = ready.logits(0)
    first = ready.store.place(delta)
    with pytest.raises(ServingError, match="one more delta than can be on the accelerator"):
        ready.store.place(delta)
    ready.store.remove(first)
    assert torch.equal(ready.logits(first.number), base)
    again = ready.store.place(delta)
    assert again.number == first.number
    assert again.key != first.key


def test_a_delta_that_is_damaged_while_it_is_placed_leaves_nothing(tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base", most_deltas=1)
    folder = esft_in(tmp_path / "delta", ready.plain)
    good = ready.read(folder)

    class Damaged:
        """As a `ServedDelta` whose file was altered after its rows had been copied."""

        def __getattr__(self, name: str) -> object:
            return getattr(good, name)

        def copy_into(self, destination: object) -> None:
            good.copy_into(destination)
            raise CorruptDeltaError("altered")

    pool = next(iter(ready.store._experts.values())).pool
    free, base = pool.num_free, ready.logits(0)
    with pytest.raises(CorruptDeltaError, match="altered"):
        ready.store.place(Damaged())
    assert pool.num_free == free
    assert torch.equal(ready.logits(1), base)
    ready.store.place(good)


@pytest.mark.parametrize(("kind", "part"), [("expert_lora", "LowRankBank"), ("lora", "LinearLora")])
def test_a_delta_that_fails_halfway_leaves_nothing_to_the_next_of_its_number(
    kind: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = Ready(tmp_path / "base", most_deltas=1)
    delta, base = ready.read(KINDS[kind](tmp_path / "delta", ready.plain)), ready.logits(0)
    made = iter([getattr(delta_store, part), None])
    monkeypatch.setattr(delta_store, part, lambda *args: next(made)(*args))
    with pytest.raises(TypeError, match="not callable"):
        ready.store.place(delta)
    assert torch.equal(ready.logits(1), base)


def test_a_delta_takes_the_bytes_of_its_own_rows(tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base")
    layers = moe_layers(ready.plain.model)
    experts = {layers[0].index: [0, 1, 3], layers[-1].index: [2]}
    delta = ready.read(esft_in(tmp_path / "delta", ready.plain, experts=experts))
    pool = next(iter(ready.store._experts.values())).pool
    before = pool.num_free
    ready.store.place(delta)
    assert before - pool.num_free == 4
    assert 4 * pool.slot_bytes == delta.num_bytes


def test_memory_is_made_ready_for_a_delta_as_large_as_the_largest(tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base")
    pool = next(iter(ready.store._experts.values())).pool

    def make_ready() -> int:
        """How many slots are, at the end."""
        while (work := ready.store.readying()) is not None:
            work()
        return pool.num_ready

    assert make_ready() == 0
    layers = moe_layers(ready.plain.model)
    small, large = ({layers[0].index: [0], layers[-1].index: ids} for ids in ([2], [0, 1, 3]))
    ready.store.place(ready.read(esft_in(tmp_path / "large", ready.plain, experts=large)))
    assert make_ready() >= 4
    ready.store.place(ready.read(esft_in(tmp_path / "small", ready.plain, experts=small)))
    assert make_ready() >= 4
    pool.take(pool.num_free)
    assert ready.store.readying() is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_passes_and_leaves_the_base_as_it_was(kind: str, tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base")
    delta = ready.read(KINDS[kind](tmp_path / "delta", ready.plain))
    placed = ready.store.place(delta)
    base = ready.logits(0)
    assert self_test(ready.loaded.model, delta, placed.number, "law") < 1e-5
    assert torch.equal(ready.logits(0), base)


def test_a_lora_on_the_output_layer_leaves_the_embeddings_as_they_are_where_the_two_are_one(tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base", tie_word_embeddings=True)
    model = ready.loaded.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    folder = lora_in(tmp_path / "delta", ready.plain, target_modules=["lm_head"])
    delta = ready.read(folder)
    placed = ready.store.place(delta)
    assert self_test(model, delta, placed.number, "law") < 1e-5
    with torch.no_grad():
        want = PeftModel.from_pretrained(ready.plain.model, folder)(torch.tensor([PROMPT]), use_cache=False).logits
    assert largest_difference(ready.logits(placed.number), want) < TOLERANCE


def test_the_self_test_sees_a_row_that_is_wrong(tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base")
    delta = ready.read(esft_in(tmp_path / "delta", ready.plain))
    placed = ready.store.place(delta)
    layer = next(iter(ready.store._experts.values()))
    layer.pool.tensors["down_proj"][placed.slots[layer.view.index][0]] *= 1.01
    with pytest.raises(VerificationError, match=r"delta 'law' .*: served, its logits differ from those of its merged"):
        self_test(ready.loaded.model, delta, placed.number, "law")


def test_the_self_test_sees_a_delta_that_is_not_used(tmp_path: Path) -> None:
    ready = Ready(tmp_path / "base")
    delta = ready.read(esft_in(tmp_path / "delta", ready.plain))
    placed = ready.store.place(delta)
    for layer in ready.store._experts.values():
        layer.slot_NE[placed.number] = -1
    with pytest.raises(VerificationError, match="served, its logits differ"):
        self_test(ready.loaded.model, delta, placed.number, "law")
