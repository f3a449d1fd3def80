"""The uniform view on MoE layers: five families by their true sizes, wrapped by PEFT, and models that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from metier.errors import UnsupportedModelError
from metier.methods.meft import MeftConfig
from metier.models.moe import moe_layers
from tiny_models import tiny_model

# index, path, num_experts, top_k, hidden, intermediate, gate, bias, transposed, concatenated, shared, router
EXPECTED = {
    "deepseek_v2": ([1, 2], "model.layers.{}.mlp", 8, 3, 32, 16, True, False, False, True, 2, "gate"),
    "qwen3_moe": ([0, 1, 2], "model.layers.{}.mlp", 6, 2, 32, 20, True, False, False, True, 0, "gate"),
    "mixtral": ([0, 1, 2], "model.layers.{}.mlp", 4, 2, 32, 24, True, False, False, True, 0, "gate"),
    "olmoe": ([0, 1, 2], "model.layers.{}.mlp", 8, 4, 32, 24, True, False, False, True, 0, "gate"),
    "gpt_oss": ([0, 1, 2], "model.layers.{}.mlp", 4, 2, 32, 24, True, True, True, False, 0, "router"),
    "nemotron_h": ([1, 2], "model.layers.{}.mixer", 4, 2, 32, 24, False, False, False, True, 1, "gate"),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_families_are_seen_with_their_true_sizes(family: str) -> None:
    indices, block, num_experts, top_k, hidden, inner, gate, bias, turned, joined, shared, router = EXPECTED[family]
    model = tiny_model(family)
    layers = moe_layers(model)
    assert [layer.index for layer in layers] == indices
    for layer in layers:
        path = block.format(layer.index)
        assert layer.path == f"{path}.experts"
        assert layer.router_path == f"{path}.{router}"
        assert layer.experts is model.get_submodule(layer.path)
        assert layer.entry is layer.experts
        assert (layer.num_experts, layer.top_k, layer.num_shared_experts) == (num_experts, top_k, shared)
        assert (layer.hidden_size, layer.moe_intermediate_size) == (hidden, inner)
        assert (layer.has_gate, layer.has_bias, layer.has_post_expert_norm) == (gate, bias, False)
        assert (layer.is_transposed, layer.is_concatenated) == (turned, joined)
        assert {name for name, _ in layer.experts.named_parameters()} == set(layer.parameter_names())


def test_parameter_names_follow_the_flags() -> None:
    assert moe_layers(tiny_model("olmoe"))[0].parameter_names() == ("gate_up_proj", "down_proj")
    assert moe_layers(tiny_model("nemotron_h"))[0].parameter_names() == ("up_proj", "down_proj")
    assert moe_layers(tiny_model("gpt_oss"))[0].parameter_names() == (
        "gate_up_proj",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    )


def test_a_peft_wrapped_layer_keeps_its_path_and_its_own_experts() -> None:
    model = tiny_model("olmoe")
    bare = moe_layers(model)
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    wrapped = get_peft_model(model, lora)
    for before, after in zip(bare, moe_layers(wrapped), strict=True):
        assert (after.index, after.path, after.router_path) == (before.index, before.path, before.router_path)
        assert (after.top_k, after.num_experts) == (before.top_k, before.num_experts)
        assert after.experts is before.experts
        assert type(after.entry).__name__ == "ParamWrapper"
        assert after.entry is wrapped.base_model.model.get_submodule(after.path)
    assert [layer.path for layer in moe_layers(wrapped.base_model)] == [layer.path for layer in bare]


def test_an_adapter_beside_the_whole_block_changes_nothing_of_the_view() -> None:
    before = moe_layers(tiny_model("olmoe"))
    after = moe_layers(get_peft_model(tiny_model("olmoe"), MeftConfig(r=64)))
    assert [(a.path, a.router_path, a.top_k) for a in after] == [(b.path, b.router_path, b.top_k) for b in before]
    assert all(layer.entry is layer.experts for layer in after)


def test_a_wrapped_router_still_says_its_top_k() -> None:
    model = tiny_model("qwen3_moe")
    model.config.num_experts_per_tok = 5  # so that the router's own value shows
    wrapped = get_peft_model(model, LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
    assert [layer.top_k for layer in moe_layers(wrapped)] == [2, 2, 2]
    assert {layer.router_path for layer in moe_layers(wrapped)} == {f"model.layers.{i}.mlp.gate" for i in range(3)}


@pytest.mark.parametrize(
    "spelling", ["num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"]
)
def test_top_k_comes_from_the_configuration_where_the_router_is_silent(spelling: str) -> None:
    model = tiny_model("olmoe")
    for block in model.model.layers:
        del block.mlp.gate.top_k
        block.mlp.experts.config = SimpleNamespace(**{spelling: 3})
    assert {layer.top_k for layer in moe_layers(model)} == {3}


def test_a_top_k_for_each_layer_is_taken_by_layer() -> None:
    model = tiny_model("olmoe")
    for block in model.model.layers:
        del block.mlp.gate.top_k
        block.mlp.experts.config = SimpleNamespace(moe_topk=[1, 2, 3])
    assert [layer.top_k for layer in moe_layers(model)] == [1, 2, 3]


def test_a_router_that_nobody_can_count_is_an_error() -> None:
    model = tiny_model("olmoe")
    del model.model.layers[1].mlp.gate.top_k
    model.model.layers[1].mlp.experts.config = SimpleNamespace()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts: neither the router nor"):
        moe_layers(model)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: the model has no MoE layer"):
        moe_layers(tiny_model("llama"))


def test_stacked_experts_without_the_flags_are_refused_by_name() -> None:
    message = r"model\.layers\.0\.feed_forward\.experts: Llama4TextExperts is an MoE layer that does not follow"
    with pytest.raises(UnsupportedModelError, match=message):
        moe_layers(tiny_model("llama4_text"))


class _Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3, bias=False)
        self.experts = experts


@pytest.mark.parametrize(
    ("experts", "kind"),
    [
        (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), "ModuleList"),
        (nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), "ModuleDict"),
    ],
)
def test_a_list_of_experts_is_refused_by_name(experts: nn.Module, kind: str) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), _Block(experts)])
    with pytest.raises(UnsupportedModelError, match=rf"layers\.1\.experts: {kind} is an MoE layer that does not"):
        moe_layers(model)


def test_one_foreign_layer_among_good_ones_is_refused() -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp = _Block(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts: ModuleList"):
        moe_layers(model)


def test_two_stacks_of_layers_in_one_model_are_refused() -> None:
    model = nn.Module()
    model.text, model.second = tiny_model("olmoe").model, tiny_model("olmoe").model
    with pytest.raises(UnsupportedModelError, match=r"layers\.0: two MoE layers have this index, text\.layers\.0"):
        moe_layers(model)


def test_experts_outside_numbered_layers_are_refused() -> None:
    model = nn.Module()
    model.mlp = tiny_model("olmoe").model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts: OlmoeExperts is not inside a numbered"):
        moe_layers(model)


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("down_proj", None, "down_proj: got no such parameter"),
        ("down_proj", nn.Parameter(torch.zeros(8, 5)), r"down_proj: got Parameter \(8, 5\)"),
        (
            "gate_up_proj",
            nn.Parameter(torch.zeros(8, 7, 32)),
            r"got \(out, in\) = \(7, 32\), expected \(48, 32\)",
        ),
    ],
)
def test_parameters_that_do_not_fit_the_flags_are_refused(
    name: str, parameter: nn.Parameter | None, message: str
) -> None:
    model = tiny_model("olmoe")
    delattr(model.model.layers[2].mlp.experts, name)
    if parameter is not None:
        setattr(model.model.layers[2].mlp.experts, name, parameter)
    with pytest.raises(UnsupportedModelError, match=message):
        moe_layers(model)
