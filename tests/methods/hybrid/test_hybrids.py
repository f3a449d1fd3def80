"""MAM and UniPELT adapters: what they compute beside their formulas, and that PEFT saves, switches and unloads them."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from methods.prefix.reference import decoder, with_plain_attention
from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError, UnsupportedModelError
from metier.methods.average import average_adapters
from metier.methods.block_layer import BlockLayer
from metier.methods.bottleneck import BottleneckConfig, BottleneckLayer
from metier.methods.hybrid import GatedLoraLayer, MamConfig, UnipeltConfig
from metier.methods.prefix import PrefixConfig, PrefixLayer
from metier.models.fingerprint import mark_skeleton
from tiny_models import tiny_model

KINDS = ("llama_gqa", "deepseek_v2", "mixtral", "gpt_oss", "qwen3_moe")
CONFIGS = {
    "mam": lambda: MamConfig(num_prefix_tokens=3, r=6),
    "unipelt": lambda: UnipeltConfig(num_prefix_tokens=3, r=6, lora_r=2),
}
METHODS = tuple(CONFIGS)
ROUNDING = {"rtol": 2e-4, "atol": 2e-5}
"""float32 over two or three layers, summed in another order."""


def tokens(seed: int = 0, count: int = 7):
    return torch.randint(3, 64, (2, count), generator=torch.Generator().manual_seed(seed))


def model(family: str = "llama"):
    return tiny_model(family).eval()


def layers(wrapped, kind=BlockLayer):
    return [module for module in wrapped.modules() if isinstance(module, kind)]


def wrapped_model(method: str, base, *, seed: int = 1, configs=CONFIGS):
    """An adapter as training might leave it."""
    wrapped = peft.get_peft_model(base, configs[method]()).train(base.training)
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5
    return wrapped


class Lora(nn.Module):
    """W x + sigmoid(gate x) B A x."""

    def __init__(self, base: nn.Module, layer: GatedLoraLayer):
        super().__init__()
        self.base, self.parts = base, copies(layer, "tuned_lora_a", "tuned_lora_b", "tuned_lora_gate")

    def forward(self, hidden):
        a, b, gate = self.parts
        return self.base(hidden) + torch.sigmoid(gate(hidden)) * b(a(hidden))


class Bottleneck(nn.Module):
    """Beside the block (MAM), or gated after it (UniPELT)."""

    def __init__(self, block: nn.Module, layer: BottleneckLayer):
        super().__init__()
        names = [
            "tuned_bottleneck_down",
            "tuned_bottleneck_up",
            *(["tuned_bottleneck_gate"] if layer.tuned_bottleneck_gate else []),
        ]
        self.block, self.parts = block, copies(layer, *names)

    def forward(self, hidden):
        out = self.block(hidden)
        first = out[0] if isinstance(out, tuple) else out
        down, up, *gates = self.parts
        if gates:
            added = torch.sigmoid(gates[0](first)) * up(torch.relu(down(first)))
        else:
            added = 4.0 * up(torch.relu(down(hidden)))
        return (first + added, *out[1:]) if isinstance(out, tuple) else first + added


def copies(layer, *names):
    result = nn.ModuleList()
    for name in names:
        linear = getattr(layer, name)["default"]
        result.append(nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None))
        result[-1].load_state_dict(linear.state_dict())
    return result


def written_out(kind: str, wrapped):
    """A plain model of the same weights with the formulas in it, and its trained tensors beside the adapter's."""
    plain, pairs = decoder(kind), []
    for layer in layers(wrapped, GatedLoraLayer) + layers(wrapped, BottleneckLayer):
        parent, _, name = layer.path.rpartition(".")
        made = (Lora if isinstance(layer, GatedLoraLayer) else Bottleneck)(plain.get_submodule(layer.path), layer)
        setattr(plain.get_submodule(parent), name, made)
        own = [p for n in layer.adapter_layer_names for m in getattr(layer, n).values() for p in m.parameters()]
        pairs += zip(own, made.parts.parameters(), strict=True)
    prefixes = layers(wrapped, PrefixLayer)
    for layer, made in zip(prefixes, with_plain_attention(plain, prefixes), strict=True):
        pairs += [(layer.tuned_prefix_key["default"], made.key), (layer.tuned_prefix_value["default"], made.value)]
        if made.gate is not None:
            pairs.append((layer.tuned_prefix_gate["default"].weight, made.gate.weight))
    return plain, pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_the_formulas(method, kind):
    wrapped = wrapped_model(method, decoder(kind))
    plain, pairs = written_out(kind, wrapped)
    num_layers = wrapped.config.num_hidden_layers
    assert len(layers(wrapped, PrefixLayer)) == len(layers(wrapped, BottleneckLayer)) == num_layers
    assert len(layers(wrapped, GatedLoraLayer)) == (2 * num_layers if method == "unipelt" else 0)
    torch.testing.assert_close(wrapped(tokens()).logits, plain(tokens()).logits, **ROUNDING)
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    plain(input_ids=tokens(), labels=tokens()).loss.backward()
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-5)
        assert own.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["llama", "deepseek_v2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_the_base_stays_as_it_is(method, family):
    base = model(family)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    logits = base(tokens()).logits
    wrapped = peft.get_peft_model(base, CONFIGS[method]()).eval()
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=3e-2, weight_decay=0.1)
    losses = []
    for _ in range(6):
        losses.append(wrapped(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    names = {n.replace(".base_layer", ""): p for n, p in wrapped.get_base_model().named_parameters()}
    assert all(torch.equal(names[name], tensor) for name, tensor in before.items())
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, logits)
    unloaded = wrapped.unload()
    assert torch.equal(unloaded(tokens()).logits, logits)
    assert not layers(unloaded)
    assert dict(unloaded.named_parameters()).keys() == before.keys()


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_is_one_file_and_gives_the_same_logits(method, family, tmp_path):
    wrapped = wrapped_model(method, model(family))
    wrapped.save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == sorted(f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn", "mlp"))
    for low_cpu_mem_usage in (False, True):
        again = peft.PeftModel.from_pretrained(model(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        torch.testing.assert_close(again(tokens()).logits, wrapped(tokens()).logits, rtol=1e-6, atol=1e-6)


LOADED_BY_TRANSFORMERS = {
    **CONFIGS,
    "bottleneck": lambda: BottleneckConfig(r=4),
    "prefix": lambda: PrefixConfig(num_prefix_tokens=3),
}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", LOADED_BY_TRANSFORMERS)
def test_transformers_loads_an_adapter_into_a_bare_model(method, family, tmp_path):
    wrapped = wrapped_model(method, model(family), configs=LOADED_BY_TRANSFORMERS)
    wrapped.save_pretrained(tmp_path)
    bare = model(family)
    bare.load_adapter(str(tmp_path))
    torch.testing.assert_close(bare(tokens()).logits, wrapped(tokens()).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_does_not_fit_and_another_base_are_refused(method, tmp_path):
    wrapped = wrapped_model(method, model())
    wrapped.save_pretrained(tmp_path)
    other = model()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="Load the base that it was trained on"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state["base_model.model.model.layers.1.mlp.tuned_bottleneck_up.weight"]
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CorruptDeltaError, match="nothing was loaded"):
        wrapped.load_adapter(str(tmp_path), "default")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_added_switched_averaged_and_deleted(method, family):
    wrapped = wrapped_model(method, model(family))
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", CONFIGS[method]())
    assert torch.equal(wrapped(tokens()).logits, first)
    assert not any(p.requires_grad for n, p in wrapped.named_parameters() if ".second" in n)
    average_adapters(wrapped, ["default", "second"])
    wrapped.set_adapter("second")
    second = wrapped(tokens()).logits
    assert not torch.equal(second, first)
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert all(".second" in name for name in trained)
    wrapped.delete_adapter("default")
    assert torch.equal(wrapped(tokens()).logits, second)
    assert {tuple(layer.adapter_names) for layer in layers(wrapped)} == {("second", "average")}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant):
    found = []
    for checkpointing in (False, True):
        base = model().train()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        wrapped = wrapped_model(method, base)
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in wrapped.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_on_a_bfloat16_base_parameters_are_float32_and_hidden_states_stay_bfloat16(method):
    wrapped = wrapped_model(method, model("deepseek_v2").bfloat16())
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert wrapped(tokens()).logits.dtype == torch.bfloat16
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_the_meta_device_can_be_wrapped_and_stays_there(method):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model().config)
        mark_skeleton(base)
        wrapped = peft.get_peft_model(base, CONFIGS[method]())
        loss = wrapped(input_ids=tokens().to("meta"), labels=tokens().to("meta")).loss
    assert all(p.is_meta for p in wrapped.parameters())
    assert loss.is_meta


@pytest.mark.parametrize("kind", ["llama_gqa", "deepseek_v2"])
@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_says_what_it_says_without_one(method, kind):
    wrapped = wrapped_model(method, decoder(kind))
    given = {"max_new_tokens": 5, "do_sample": False}
    with_cache = wrapped.generate(input_ids=tokens(), **given)
    assert torch.equal(with_cache, wrapped.generate(input_ids=tokens(), **given, use_cache=False))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name(method, verb):
    wrapped = wrapped_model(method, model())
    before = wrapped(tokens()).logits
    with pytest.raises(DeltaError, match="no change of the base's weights"):
        getattr(wrapped, verb)()
    assert torch.equal(wrapped(tokens()).logits, before)


def test_no_gate_sees_what_comes_after_its_token():
    wrapped, other = wrapped_model("unipelt", decoder("llama_gqa")), tokens()
    other[:, 5:] = 5
    torch.testing.assert_close(wrapped(tokens()).logits[:, :5], wrapped(other).logits[:, :5], **ROUNDING)


def test_the_network_of_a_mam_prefix_folds():
    wrapped = peft.get_peft_model(model(), MamConfig(num_prefix_tokens=3, r=6, prefix_bottleneck=5)).eval()
    logits = wrapped(tokens()).logits
    wrapped.fold_prefix()
    assert wrapped.peft_config["default"].prefix_bottleneck is None
    assert not any("tuned_prefix_tokens" in name for name, _ in wrapped.named_parameters())
    torch.testing.assert_close(wrapped(tokens()).logits, logits, rtol=1e-6, atol=1e-6)


class TestLoraTargets:
    @pytest.mark.parametrize(
        ("changes", "expected"), [({}, {"q_proj", "kv_b_proj"}), ({"q_lora_rank": 8}, {"q_b_proj", "kv_b_proj"})]
    )
    def test_latent_attention_has_its_own(self, changes, expected):
        wrapped = wrapped_model("unipelt", tiny_model("deepseek_v2", **changes))
        assert {layer.path.rpartition(".")[2] for layer in layers(wrapped, GatedLoraLayer)} == expected

    def test_they_may_be_named(self):
        wrapped = peft.get_peft_model(model(), UnipeltConfig(lora_targets=["o_proj"]))
        assert {layer.path.rpartition(".")[2] for layer in layers(wrapped, GatedLoraLayer)} == {"o_proj"}
        with pytest.raises(ConfigError, match="got 'qkv', expected some of its children: q_proj, k_proj"):
            peft.get_peft_model(model(), UnipeltConfig(lora_targets=["qkv"]))

    def test_what_is_no_linear_layer_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="kv_a_layernorm: got a DeepseekV2RMSNorm, expected a linear"):
            peft.get_peft_model(model("deepseek_v2"), UnipeltConfig(lora_targets=["kv_a_layernorm"]))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (MamConfig, {"num_prefix_tokens": 0}, "num_prefix_tokens must be at least 1, got 0"),
        (MamConfig, {"prefix_bottleneck": 0}, "bottleneck must be at least 1 or None, got 0"),
        (MamConfig, {"r": 0}, "r must be at least 1, got 0"),
        (MamConfig, {"scaling": -1.0}, "scaling must be greater than 0"),
        (UnipeltConfig, {"lora_r": 0}, "lora_r must be at least 1, got 0"),
        (UnipeltConfig, {"lora_targets": []}, "lora_targets must name some projection or be None"),
        (UnipeltConfig, {"activation": "tanh"}, "activation must be relu or gelu or silu"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)
