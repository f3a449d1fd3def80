"""Values of a delta, by each way to them, are those that its method computes with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from metier.errors import CorruptDeltaError
from metier.models.moe import moe_layers
from metier.serving.checked_reader import CheckedReader
from metier.serving.delta_source import open_served_delta, read_served_delta
from metier.serving.model_facts import ModelFacts, model_facts
from metier.serving.served_delta import ServedDelta
from serving.made_deltas import alter_last_byte, made_model, save_esft

KINDS = ["esft", "expert_lora", "lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_values_are_those_of_the_file(saved: Path, facts: ModelFacts, kind: str) -> None:
    delta = read_served_delta(saved / kind, facts=facts)
    stored = load_file(saved / kind / "adapter_model.safetensors")
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("expert_ids")}
    assert delta.kind == kind
    assert delta.loaded is not None
    assert delta.loaded.keys() == stored.keys() == {tensor.name for tensor in delta.tensors}
    assert all(torch.equal(delta.loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_loaded", [True, False])
def test_values_go_from_disk_and_from_host_to_the_same_places(
    saved: Path, facts: ModelFacts, reader: CheckedReader, kind: str, is_loaded: bool
) -> None:
    opened = open_served_delta(saved / kind, facts=facts, reader=reader)
    assert opened.loaded is None
    loaded = opened.load()
    delta = loaded if is_loaded else opened
    whole = {tensor.name: torch.zeros(tensor.shape) for tensor in delta.tensors}
    delta.copy_into(lambda tensor: whole[tensor.name])
    rows = {x.name: [torch.zeros(x.shape[1:]) for _ in range(x.shape[0])] for x in delta.tensors}
    delta.copy_into(lambda tensor: rows[tensor.name])
    assert loaded.loaded is not None
    assert all(torch.equal(whole[name], tensor) for name, tensor in loaded.loaded.items())
    assert all(torch.equal(torch.stack(rows[name]), tensor) for name, tensor in loaded.loaded.items())


def test_rows_are_served_in_the_bases_dtype_whatever_they_are_stored_in(tmp_path: Path) -> None:
    model = made_model(dtype=torch.bfloat16)
    folders = {dtype: save_esft(model, tmp_path / str(dtype), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    deltas = {dtype: read_served_delta(folder, facts=model_facts(model, "x")) for dtype, folder in folders.items()}
    wide, narrow = deltas.values()
    assert wide.loaded is not None
    assert narrow.loaded is not None
    for name, tensor in narrow.loaded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(wide.loaded[name], tensor)
    assert wide.num_bytes == narrow.num_bytes


def test_each_parameter_is_served_in_its_own_dtype(tmp_path: Path) -> None:
    model = made_model()
    for layer in moe_layers(model):
        layer.experts.down_proj.data = layer.experts.down_proj.data.to(torch.bfloat16)
    delta = read_served_delta(save_esft(model, tmp_path / "delta"), facts=model_facts(model, "x"))
    dtypes = {tensor.parameter: (delta.loaded or {})[tensor.name].dtype for tensor in delta.tensors}
    assert dtypes == {"gate_up_proj": torch.float32, "down_proj": torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_loaded_tensors(
    saved: Path, facts: ModelFacts, reader: CheckedReader, kind: str
) -> None:
    delta = open_served_delta(saved / kind, facts=facts, reader=reader)
    loaded = delta.load().loaded or {}
    assert delta.num_bytes == sum(tensor.nbytes for tensor in loaded.values()) > 0


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_a_row_has_the_layout_of_the_bases_parameter(tmp_path: Path, family: str) -> None:
    model = made_model(family)
    chosen = {1: [0, 1, 3], 2: [2]}
    delta = read_served_delta(save_esft(model, tmp_path / "delta", experts=chosen), facts=model_facts(model, "x"))
    assert delta.experts == {1: (0, 1, 3), 2: (2,)}
    names = {layer.index: layer.parameter_names() for layer in moe_layers(model)}
    assert {(x.layer, x.parameter) for x in delta.tensors} == {(n, name) for n in chosen for name in names[n]}
    for tensor in delta.tensors:
        experts = model.get_submodule(tensor.path)
        assert tensor.shape == (len(chosen[tensor.layer or 0]), *getattr(experts, tensor.parameter).shape[1:])


def test_scales_of_a_lora_on_experts_stand_in_the_order_of_its_experts(saved: Path, facts: ModelFacts) -> None:
    delta = read_served_delta(saved / "expert_lora", facts=facts)
    # alpha 8, rank 4, but 2 of expert 3 in layer 1
    assert delta.scales == {"model.layers.1.mlp.experts": (2.0, 4.0, 2.0), "model.layers.2.mlp.experts": (2.0,)}
    assert {x.parameter for x in delta.tensors} == {"up_A", "up_B", "down_A", "down_B"}


@pytest.mark.parametrize(
    "read", [ServedDelta.check, ServedDelta.load, lambda x: x.copy_into(lambda t: torch.zeros(t.shape))]
)
@pytest.mark.parametrize("kind", ["esft", "expert_lora"])
def test_every_way_to_the_values_finds_an_altered_byte(
    copy_of: Callable[..., Path],
    facts: ModelFacts,
    reader: CheckedReader,
    kind: str,
    read: Callable[[ServedDelta], None],
) -> None:
    folder = copy_of(kind)
    delta = open_served_delta(folder, facts=facts, reader=reader)
    read(delta)
    alter_last_byte(folder)
    with pytest.raises(CorruptDeltaError, match="got sha256"):
        read(delta)


def test_a_delta_is_marked_where_it_has_no_sums(saved: Path, facts: ModelFacts, reader: CheckedReader) -> None:
    has_sums = {kind: open_served_delta(saved / kind, facts=facts, reader=reader).has_sums for kind in KINDS}
    assert has_sums == {"esft": True, "expert_lora": True, "lora": False}


def test_a_delta_that_peft_saved_is_served_without_sums(
    model: PreTrainedModel, facts: ModelFacts, saved: Path, tmp_path: Path
) -> None:
    import peft

    wrapped = peft.PeftModel.from_pretrained(model, saved / "esft")
    wrapped.save_pretrained(tmp_path / "delta", save_embedding_layers=False)
    wrapped.unload()
    delta, want = (read_served_delta(folder, facts=facts) for folder in (tmp_path / "delta", saved / "esft"))
    assert not delta.has_sums
    assert delta.loaded is not None
    assert want.loaded is not None
    assert all(torch.equal(delta.loaded[name], tensor) for name, tensor in want.loaded.items())
