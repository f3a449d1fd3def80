"""Attention modules in dense and MoE decoders, the sizes of their heads, and what is asked of transformers' interface."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from metier.errors import UnsupportedModelError
from metier.models.attention import HeadSizes, attention_paths, head_sizes, interface_paths, query_value_names
from metier.models.attention_interface import ExtraKeys, attending_to
from tiny_models import tiny_model

ALL_LAYERS = [f"model.layers.{index}.self_attn" for index in range(3)]


@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "mixtral", "gpt_oss", "qwen3_moe", "llama4_text"])
def test_every_layer_of_a_dense_and_of_an_moe_decoder_has_its_attention(family):
    assert attention_paths(tiny_model(family)) == interface_paths(tiny_model(family)) == ALL_LAYERS


def test_mamba_mixers_are_no_attention():
    assert attention_paths(tiny_model("nemotron_h")) == ["model.layers.0.mixer"]


def test_linear_attention_is_attention_but_does_not_call_the_interface():
    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert attention_paths(model) == ["model.layers.0.linear_attn", "model.layers.1.self_attn"]
    assert interface_paths(model) == ["model.layers.1.self_attn"]


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, (2, 8, 8)),
        ("qwen3_moe", {"head_dim": 24, "num_key_value_heads": 1}, (1, 24, 24)),
        ("deepseek_v2", {"v_head_dim": 12, "num_attention_heads": 4}, (4, 16, 12)),
    ],
)
def test_head_sizes_follow_from_the_projections_without_weights(family, changes, expected):
    config = tiny_model(family, **changes).config
    with torch.device("meta"):
        attention = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    sizes = dict(zip(("num_key_value_heads", "key_head_dim", "value_head_dim"), expected, strict=True))
    assert head_sizes(attention, "here") == HeadSizes(**sizes)


def test_what_only_has_a_name_like_attention_is_none():
    model = tiny_model("llama")
    model.model.layers[0].attn_hc = nn.Linear(2, 2)
    model.model.layers[1].other = model.model.layers[1].self_attn
    del model.model.layers[1].self_attn
    assert attention_paths(model) == [ALL_LAYERS[0], "model.layers.1.other", ALL_LAYERS[2]]


def test_a_module_that_says_no_sizes_is_refused():
    with pytest.raises(UnsupportedModelError, match="here: neither the module nor its configuration says head_dim"):
        head_sizes(nn.Linear(2, 2), "here")


def test_queries_and_values_have_names_in_latent_attention_as_well():
    assert query_value_names(tiny_model("llama").model.layers[0].self_attn, "x") == ["q_proj", "v_proj"]
    assert query_value_names(tiny_model("deepseek_v2").model.layers[0].self_attn, "x") == ["q_proj", "kv_b_proj"]
    low_rank = tiny_model("deepseek_v2", q_lora_rank=8).model.layers[0].self_attn
    assert query_value_names(low_rank, "x") == ["q_b_proj", "kv_b_proj"]
    fused = nn.ModuleDict({"qkv_proj": nn.Linear(2, 6)})
    with pytest.raises(UnsupportedModelError, match=r"no projection of its own for queries.*children are qkv_proj"):
        query_value_names(fused, "x")


def test_transformers_interface_is_as_it_was_outside_of_a_module_with_extra_keys():
    attention = tiny_model("llama").model.layers[0].self_attn
    extra = ExtraKeys(module=attention, path="x", key_GPK=torch.zeros(2, 1, 16), value_GPV=torch.zeros(2, 1, 16))
    with attending_to(extra):
        assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", len) is not sdpa_attention_forward
        extra.was_used = True
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", len) is sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", len) is len


def test_another_module_inside_of_one_with_extra_keys_gets_what_transformers_gives():
    attention, other = (tiny_model("llama").model.layers[index].self_attn for index in (0, 1))
    extra = ExtraKeys(module=attention, path="x", key_GPK=torch.zeros(2, 1, 16), value_GPV=torch.zeros(2, 1, 16))
    heads = torch.randn(1, 2, 5, 16)
    with attending_to(extra):
        function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        got, _ = function(other, heads, heads, heads, None)
        extra.was_used = True
    assert torch.equal(got, sdpa_attention_forward(other, heads, heads, heads, None)[0])
