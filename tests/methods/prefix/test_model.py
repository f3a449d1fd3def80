"""Prefixes through PEFT: trained, saved, folded, several at once, and what is refused."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError, UnsupportedModelError
from metier.methods.prefix import PrefixConfig, PrefixLayer
from metier.models.fingerprint import mark_skeleton
from tiny_models import tiny_model

FAMILIES = ("llama", "deepseek_v2", "mixtral", "gpt_oss", "qwen3_moe")
VARIANTS = ({}, {"bottleneck": 6}, {"gated": True})
ELSEWHERE = {"rtol": 1e-6, "atol": 1e-6}
"""Products of a network as small as these tests' depend in their last bit on where in memory it lies."""


def tokens(seed: int = 0):
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(seed))


def model(family: str = "llama"):
    return tiny_model(family).eval()


def layers(wrapped) -> list[PrefixLayer]:
    return [module for module in wrapped.modules() if isinstance(module, PrefixLayer)]


def wrapped_model(family: str = "llama", *, base=None, **options):
    base = base or model(family)
    torch.manual_seed(1)
    options = {"num_prefix_tokens": 3, **options}
    return peft.get_peft_model(base, PrefixConfig(**options)).train(base.training)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_prefix_trains_and_the_base_stays_as_it_is(family, options):
    base = model(family)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    logits = base(tokens()).logits
    wrapped = wrapped_model(base=base, **options)
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=5e-2, weight_decay=0.1)
    losses = []
    for _ in range(8):
        losses.append(wrapped(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    names = {n.replace(".base_layer", ""): p for n, p in wrapped.get_base_model().named_parameters()}
    assert all(torch.equal(names[name], tensor) for name, tensor in before.items())
    assert not torch.equal(wrapped(tokens()).logits, logits)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, logits)
    assert torch.equal(wrapped.unload()(tokens()).logits, logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(options, reentrant):
    found = []
    for checkpointing in (False, True):
        base = model().train()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        wrapped = wrapped_model(base=base, **options)
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in wrapped.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_on_a_bfloat16_base_parameters_are_float32_and_hidden_states_stay_bfloat16(options):
    wrapped = wrapped_model(base=model().bfloat16(), **options)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert wrapped(tokens()).logits.dtype == torch.bfloat16
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_model_on_the_meta_device_can_be_wrapped_and_stays_there(family, options):
    config = model(family).config
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        mark_skeleton(base)
        wrapped = wrapped_model(base=base, **options)
        attention = next(iter(layers(wrapped)))
        hidden = torch.empty(1, 7, 32)
        rotation = base.model.rotary_emb(hidden, torch.arange(7)[None])
        out, _ = attention(hidden_states=hidden, position_embeddings=rotation, attention_mask=None)
    assert all(p.is_meta for p in wrapped.parameters())
    assert out.is_meta
    assert out.shape == hidden.shape


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v2"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_saved_prefix_gives_the_same_logits(family, options, tmp_path):
    wrapped = wrapped_model(family, **options)
    wrapped.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = peft.PeftModel.from_pretrained(model(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        torch.testing.assert_close(again(tokens()).logits, wrapped(tokens()).logits, **ELSEWHERE)
        loaded = peft.get_peft_model_state_dict(again)
        assert all(torch.equal(loaded[key], value) for key, value in peft.get_peft_model_state_dict(wrapped).items())


def test_folding_keeps_what_the_network_makes(tmp_path):
    wrapped = wrapped_model(bottleneck=6)
    logits = wrapped(tokens()).logits
    wrapped.fold_prefix()
    torch.testing.assert_close(wrapped(tokens()).logits, logits, **ELSEWHERE)
    wrapped.save_pretrained(tmp_path)
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"tuned_prefix_key", "tuned_prefix_value"}
    again = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)
    assert again.peft_config["default"].bottleneck is None
    with pytest.raises(ConfigError, match="got no adapter 'other', expected one of default"):
        wrapped.fold_prefix("other")


def test_two_active_prefixes_are_one_of_both_lengths():
    wrapped = wrapped_model()
    wrapped.add_adapter("second", PrefixConfig(num_prefix_tokens=2))
    wrapped.base_model.set_adapter(["default", "second"])
    both = wrapped(tokens()).logits
    one = wrapped_model(num_prefix_tokens=5)
    for layer, longer in zip(layers(wrapped), layers(one), strict=True):
        for name in ("tuned_prefix_key", "tuned_prefix_value"):
            joined = torch.cat([getattr(layer, name)["default"], getattr(layer, name)["second"]], 1)
            getattr(longer, name)["default"].data = joined.detach()
    torch.testing.assert_close(both, one(tokens()).logits, rtol=1e-5, atol=1e-6)


def test_gated_prefixes_answer_one_at_a_time():
    wrapped = wrapped_model(gated=True)
    wrapped.add_adapter("second", PrefixConfig(num_prefix_tokens=2))
    wrapped.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="gated prefixes answer one at a time, got default, second"):
        wrapped(tokens())


def test_adapters_are_switched_and_deleted():
    wrapped = wrapped_model()
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", PrefixConfig(num_prefix_tokens=2, bottleneck=4))
    assert torch.equal(wrapped(tokens()).logits, first)
    wrapped.set_adapter("second")
    assert not torch.equal(wrapped(tokens()).logits, first)
    wrapped.delete_adapter("default")
    assert {tuple(layer.adapter_names) for layer in layers(wrapped)} == {("second",)}


def test_a_copy_of_the_model_answers_alike():
    wrapped = wrapped_model()
    assert torch.equal(copy.deepcopy(wrapped)(tokens()).logits, wrapped(tokens()).logits)


def test_attention_weights_are_those_of_the_tokens():
    base = model()
    base.set_attn_implementation("eager")
    found = wrapped_model(base=base)(tokens(), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in found] == [(2, 2, 7, 7)] * 3
    assert (found[0].sum(-1) < 0.99).all(), "the prefix has its share"


def test_another_base_is_refused(tmp_path):
    wrapped_model().save_pretrained(tmp_path)
    other = model()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="Load the base that it was trained on"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_a_truncated_file_is_refused_before_anything_is_loaded(tmp_path):
    wrapped = wrapped_model()
    wrapped.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state["base_model.model.model.layers.1.self_attn.tuned_prefix_value"]
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "adapter_model.safetensors")
    before = wrapped(tokens()).logits
    with pytest.raises(CorruptDeltaError, match="nothing was loaded"):
        wrapped.load_adapter(str(tmp_path), "default")
    assert torch.equal(wrapped(tokens()).logits, before)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name(verb):
    with pytest.raises(DeltaError, match="keys and values of its own"):
        getattr(wrapped_model(), verb)()


class Foreign(nn.Module):
    """Attention of a model that computes it by itself, or with other heads than its configuration says."""

    def __init__(self, attention):
        super().__init__()
        self.inner, self.config, self.head_dim, self.num_heads = attention, attention.config, 16, 2

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Rescaled(nn.Module):
    """Attention whose keys have other sizes than its projections."""

    head_dim = 8

    def __init__(self, attention):
        super().__init__()
        self.config, self.weight = attention.config, nn.Parameter(torch.ones(1))

    def forward(self, hidden_states, **kwargs):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        heads = hidden_states.view(2, 7, 2, 16).transpose(1, 2)
        out, weights = function(self, heads, heads, heads, None)
        return out.flatten(2), weights


def test_a_module_that_does_not_call_the_interface_is_refused_at_its_first_pass():
    base = model()
    base.model.layers[1].self_attn = Foreign(base.model.layers[1].self_attn)
    wrapped = wrapped_model(base=base, target_modules=["model.layers.1.self_attn"])
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn: Foreign did not call .* interface"):
        wrapped(tokens())


def test_keys_of_other_sizes_are_refused_at_the_first_pass():
    base = model()
    base.model.layers[1].self_attn = Rescaled(base.model.layers[1].self_attn)
    with pytest.raises(UnsupportedModelError, match="keys of 2 heads of 16, expected 2 heads of 8"):
        wrapped_model(base=base)(tokens())


def test_a_model_whose_attention_never_calls_the_interface_is_refused():
    base = model()
    for layer in base.model.layers:
        layer.self_attn = Foreign(layer.self_attn)
    with pytest.raises(UnsupportedModelError, match=r"none of its attention modules \(Foreign\) calls"):
        wrapped_model(base=base)


def test_other_attention_implementations_are_refused_at_the_wrap_and_at_a_pass():
    base = model()
    wrapped = wrapped_model(base=base)
    base.config._attn_implementation_internal = "flash_attention_2"  # as set_attn_implementation does where it can
    with pytest.raises(ConfigError, match="got attn_implementation='flash_attention_2', expected sdpa or eager"):
        wrapped(tokens())
    with pytest.raises(ConfigError, match="Load the model with attn_implementation='sdpa'"):
        wrapped_model(base=wrapped.unload())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prefix_tokens": 0}, "num_prefix_tokens must be at least 1, got 0"),
        ({"bottleneck": 0}, "bottleneck must be at least 1 or None, got 0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PrefixConfig(**options)
