"""What a server keeps of its base, and what it does not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import PreTrainedModel

from metier.errors import UnsupportedModelError
from metier.models.fingerprint import fingerprint
from metier.models.moe import moe_layers
from metier.serving.model_facts import ModelFacts, model_facts
from serving.made_deltas import made_model


def test_layers_are_the_bases_without_its_values(model: PreTrainedModel, facts: ModelFacts) -> None:
    assert facts.fingerprint == fingerprint(model)
    for layer, base in zip(facts.layers, moe_layers(model), strict=True):
        assert (layer.index, layer.path, layer.num_experts) == (base.index, base.path, base.num_experts)
        for name in base.parameter_names():
            got, want = getattr(layer.experts, name), getattr(base.experts, name)
            assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


def test_linear_layers_are_known_by_path_and_shape(facts: ModelFacts) -> None:
    assert facts.linears["model.layers.1.mlp.shared_experts.down_proj"].shape == (32, 64)
    assert facts.linears["lm_head"].dtype == torch.float32
    assert not any(".experts." in path for path in facts.linears)


def test_facts_keep_nothing_of_the_base_alive() -> None:
    model = made_model()
    facts = model_facts(model, "tiny")
    kept = weakref.ref(model.model.layers[1].mlp.experts)
    del model
    gc.collect()
    assert kept() is None
    assert facts.layers


def test_a_dense_base_has_no_layers_of_experts() -> None:
    facts = model_facts(made_model("llama"), "llama")
    assert facts.layers == ()
    assert len(facts.fingerprint) == 64


def test_a_quantised_linear_layer_is_none_that_a_delta_can_change() -> None:
    model = made_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    assert "model.layers.0.self_attn.q_proj" not in model_facts(model, "llama").linears


def test_quantised_experts_are_refused() -> None:
    model = made_model()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.layers\.1\.mlp\.experts\.down_proj: got torch\.float8_e4m3fn, expected one of torch\.float64",
    ):
        model_facts(model, "tiny")
