"""BitFit: biases that a base has, biases that it gets, and where those can be merged."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from metier.errors import DeltaError
from metier.methods.sparse_delta import SparseDeltaConfig, SparseDeltaLayer, choose_entries
from tiny_models import tiny_model

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ADDED = 1e-5
"""A bias inside a product and one added to it are rounded differently, by units in the last place of float32."""


def llama(**options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, **options), dtype=torch.float32).eval()


def qwen2():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen2Config(**SIZES), dtype=torch.float32).eval()


def tokens(seed: int = 0):
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(seed))


def train(model, steps: int = 3, **options):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, eps=1e-4, **options)
    for step in range(steps):
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def bitfit(model, **options):
    return train(peft.get_peft_model(model, SparseDeltaConfig(mask="bias", **options)))


def test_a_base_without_biases_gets_them_from_zero():
    logits = llama()(tokens()).logits
    fresh = peft.get_peft_model(llama(), SparseDeltaConfig(mask="bias"))
    assert torch.equal(fresh(tokens()).logits, logits)
    assert fresh.get_nb_trainable_parameters()[0] == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)

    dense = llama(attention_bias=True, mlp_bias=True)
    dense.load_state_dict(llama().state_dict(), strict=False)
    for name, parameter in dense.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
        parameter.requires_grad_(name.endswith(".bias"))
    train(dense)
    wrapped = train(fresh)
    torch.testing.assert_close(wrapped(tokens()).logits, dense(tokens()).logits, rtol=0, atol=ADDED)
    for layer in (module for module in wrapped.modules() if isinstance(module, SparseDeltaLayer)):
        torch.testing.assert_close(
            layer.values_of("bias")["default"], dense.get_parameter(f"{layer.path}.bias"), rtol=0, atol=ADDED
        )
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, logits)


def test_added_biases_are_saved_and_loaded(tmp_path):
    wrapped = bitfit(llama())
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)


@pytest.mark.parametrize("targets", [None, ["q_proj.bias", "v_proj.bias"], ["up_proj"]])
def test_added_biases_merge_where_the_architecture_has_room_for_them(targets, tmp_path):
    wrapped = bitfit(llama(), target_modules=targets)
    logits = wrapped(tokens()).logits
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(tokens()).logits, logits, rtol=0, atol=ADDED)
    wrapped.unmerge_adapter()
    assert torch.equal(wrapped(tokens()).logits, logits)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, logits, rtol=0, atol=ADDED)
    assert merged.config.attention_bias == (targets != ["up_proj"])
    assert merged.config.mlp_bias == (targets is None or targets == ["up_proj"])
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens()).logits, merged(tokens()).logits)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_added_biases_that_a_checkpoint_could_not_hold_are_not_merged(verb):
    for model, path in ((qwen2(), "self_attn.o_proj.bias"), (tiny_model("mixtral"), "self_attn.k_proj.bias")):
        options = {"new_biases": "always", "target_modules": [path.removeprefix("self_attn.")]}
        wrapped = peft.get_peft_model(model, SparseDeltaConfig(mask="bias", **options))
        with pytest.raises(DeltaError, match=rf"layers.0.{path}: the adapter adds a bias here, and .* has no place"):
            getattr(wrapped, verb)()


def test_biases_that_are_there_are_trained_in_place_and_merge_to_the_bit():
    wrapped = bitfit(qwen2())
    names = {path.split(".", 3)[3] for path in wrapped.peft_config["default"].num_entries_by_parameter}
    assert names == {f"self_attn.{name}_proj.bias" for name in "qkv"}
    logits = wrapped(tokens()).logits
    assert not torch.equal(logits, qwen2()(tokens()).logits)
    assert torch.equal(wrapped.merge_and_unload()(tokens()).logits, logits)
    everywhere = choose_entries(qwen2(), SparseDeltaConfig(mask="bias", new_biases="always"))
    assert len(everywhere) == 14


def test_experts_with_biases_train_theirs():
    model = tiny_model("gpt_oss", num_hidden_layers=1)
    got = choose_entries(model, SparseDeltaConfig(mask="bias"))
    assert {name.split(".", 3)[3] for name in got} == {
        "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias",
        *(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    }  # fmt: skip


def test_two_adapters_on_layers_one_inside_the_other():
    """gpt-oss' attention holds a parameter of its own beside the projections in it."""
    model = tiny_model("gpt_oss", num_hidden_layers=2).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(tokens()).logits
    wrapped = train(peft.get_peft_model(model, SparseDeltaConfig(mask="layer", layers=[0])))
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", SparseDeltaConfig(mask="layer", last_layers=2))
    wrapped.set_adapter("second")
    assert torch.equal(wrapped(tokens()).logits, logits)
    train(wrapped)
    inside = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.base_layer.q_proj")
    assert isinstance(inside, SparseDeltaLayer)
    assert inside.adapter_names == ["default", "second"]
    assert all(inside.values_of("weight")[name].any() for name in inside.adapter_names)
    wrapped.set_adapter("default")
    assert torch.equal(wrapped(tokens()).logits, first)
    base = wrapped.unload()
    assert {name: None for name, _ in base.named_parameters()} == dict.fromkeys(before)
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
