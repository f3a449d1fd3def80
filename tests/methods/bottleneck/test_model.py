"""Bottleneck adapters through PEFT: on dense and MoE decoders, beside a plain one, saved, dropped, and refused."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError, UnsupportedModelError
from metier.methods.bottleneck import BottleneckConfig, BottleneckLayer
from metier.models.fingerprint import mark_skeleton
from tiny_models import tiny_model

FAMILIES = ("llama", "deepseek_v2", "mixtral", "gpt_oss", "qwen3_moe")
VARIANTS = ("houlsby", "pfeiffer", "parallel")
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""The reference adds in another order, in float32."""


def tokens(seed: int = 0):
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(seed))


def model(family: str = "llama", **changes):
    return tiny_model(family, **changes).eval()


def layers(wrapped) -> list[BottleneckLayer]:
    return [module for module in wrapped.modules() if isinstance(module, BottleneckLayer)]


def randomised(wrapped, seed: int = 1):
    """An adapter as training might leave it: `up` is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "bottleneck_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3
    return wrapped


def wrapped_model(family: str = "llama", *, base=None, **options):
    torch.manual_seed(0)
    base = base or model(family)
    wrapped = peft.get_peft_model(base, BottleneckConfig(r=8, **options)).train(base.training)
    return randomised(wrapped)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_changes_nothing_then_trains_and_leaves_the_base_alone(family, variant):
    base = model(family)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    logits = base(tokens()).logits
    wrapped = peft.get_peft_model(base, BottleneckConfig(r=8, variant=variant, layer_norm=True))
    assert len(layers(wrapped)) == 3 * (2 if variant == "houlsby" else 1)
    assert torch.equal(wrapped(tokens()).logits, logits)
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


class Reference(nn.Module):
    """The papers' formulas, written out for one adapter in float32."""

    def __init__(self, layer: BottleneckLayer, config: BottleneckConfig):
        super().__init__()
        self.block, self.config = layer.base_layer, config
        self.norm = copy.deepcopy(layer.tuned_bottleneck_norm["default"]) if config.layer_norm else nn.Identity()
        self.down = copy.deepcopy(layer.tuned_bottleneck_down["default"])
        self.up = copy.deepcopy(layer.tuned_bottleneck_up["default"])
        self.gate = copy.deepcopy(layer.tuned_bottleneck_gate["default"]) if config.gated else None

    def forward(self, *args, **kwargs):
        out = self.block(*args, **kwargs)
        is_tuple = isinstance(out, tuple)
        y = out[0] if is_tuple else out
        x = args[0] if args else kwargs["hidden_states"]
        read = x if self.config.variant == "parallel" else y
        act = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}[self.config.activation]
        added = self.up(act(self.down(self.norm(read)))) * self.config.scaling
        if self.gate is not None:
            added = added * torch.sigmoid(self.gate(read))
        return (y + added, *out[1:]) if is_tuple else y + added


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [
        {"variant": "houlsby"},
        {"variant": "pfeiffer", "activation": "gelu", "layer_norm": True},
        {"variant": "parallel", "activation": "silu", "scaling": 4.0},
        {"variant": "houlsby", "gated": True, "scaling": 0.5},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_formula(family, options):
    wrapped = wrapped_model(family, **options)
    plain = model(family)
    found = {}
    for layer in layers(wrapped):
        parent, _, name = layer.path.rpartition(".")
        found[layer] = Reference(layer, layer.configs["default"])
        found[layer].block = plain.get_submodule(layer.path)
        setattr(plain.get_submodule(parent), name, found[layer])
    torch.testing.assert_close(wrapped(tokens()).logits, plain(tokens()).logits, **ROUNDING)
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    plain(input_ids=tokens(), labels=tokens()).loss.backward()
    for layer, reference in found.items():
        for part in ("norm", "down", "up", "gate"):
            for own, other in zip(
                (p for m in getattr(layer, f"tuned_bottleneck_{part}").values() for p in m.parameters()),
                (p for p in (getattr(reference, part) or nn.Identity()).parameters()),
                strict=True,
            ):
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training_only():
    wrapped = wrapped_model(dropout=0.5)
    assert torch.equal(wrapped(tokens()).logits, wrapped(tokens()).logits)
    wrapped.train()
    assert not torch.equal(wrapped(tokens()).logits, wrapped(tokens()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    found = []
    for checkpointing in (False, True):
        base = model().train()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        wrapped = wrapped_model(base=base, variant="houlsby", random_drop_layers=2)
        torch.manual_seed(3)
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in wrapped.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_on_a_bfloat16_base_parameters_are_float32_and_hidden_states_stay_bfloat16():
    base = model().bfloat16()
    wrapped = wrapped_model(base=base, variant="houlsby", layer_norm=True, gated=True)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert wrapped(tokens()).logits.dtype == torch.bfloat16
    loss = wrapped(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)


def test_a_model_on_the_meta_device_can_be_wrapped_and_stays_there():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model().config)
        mark_skeleton(base)
        wrapped = peft.get_peft_model(base, BottleneckConfig(r=8, variant="houlsby", layer_norm=True, gated=True))
        loss = wrapped(input_ids=tokens().to("meta"), labels=tokens().to("meta")).loss
    assert all(p.is_meta for p in wrapped.parameters())
    assert loss.is_meta


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_saved_adapter_gives_the_same_logits(family, tmp_path):
    wrapped = wrapped_model(family, variant="houlsby", layer_norm=True, gated=True)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model(family), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)
    assert all(name.split(".")[-2] != "default" for name in load_file(tmp_path / "adapter_model.safetensors"))
    low = peft.PeftModel.from_pretrained(model(family), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(low(tokens()).logits, wrapped(tokens()).logits)


def test_another_base_is_refused(tmp_path):
    wrapped_model().save_pretrained(tmp_path)
    other = model()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="Load the base that it was trained on"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("breakage", ["missing", "foreign", "shape"])
def test_a_file_that_does_not_fit_is_refused_before_anything_is_loaded(breakage, tmp_path):
    wrapped = wrapped_model()
    wrapped.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = "base_model.model.model.layers.1.mlp.tuned_bottleneck_down.weight"
    if breakage == "missing":
        del state[name]
    elif breakage == "foreign":
        state[name.replace("layers.1", "layers.7")] = state[name].clone()
    else:
        state[name] = state[name][:-1].contiguous()
    save_file(state, path)
    fresh = wrapped_model()
    before = fresh(tokens()).logits
    with pytest.raises(CorruptDeltaError, match="nothing was loaded"):
        fresh.load_adapter(str(tmp_path), "default")
    assert torch.equal(fresh(tokens()).logits, before)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name(verb):
    with pytest.raises(DeltaError, match="an activation between its two layers"):
        getattr(wrapped_model(), verb)()


def test_unloading_gives_the_base_back():
    base = model()
    logits = base(tokens()).logits
    assert torch.equal(wrapped_model(base=base, variant="houlsby").unload()(tokens()).logits, logits)
    assert not any(isinstance(module, BottleneckLayer) for module in base.modules())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_adapters_and_deleting_one(family):
    wrapped = wrapped_model(family)
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", BottleneckConfig(r=4, variant="houlsby"))
    assert torch.equal(wrapped(tokens()).logits, first)
    assert not any(p.requires_grad for n, p in wrapped.named_parameters() if ".second." in n)
    wrapped.set_adapter("second")
    randomised(wrapped, seed=2)
    assert not torch.equal(wrapped(tokens()).logits, first)
    wrapped.delete_adapter("default")
    assert {tuple(layer.adapter_names) for layer in layers(wrapped)} == {("second",)}


def test_mixing_adapters_in_a_batch_is_refused():
    with pytest.raises(ConfigError, match="one adapter at a time"):
        wrapped_model()(tokens(), adapter_names=["default", "__base__"])


def test_modules_may_be_named_and_one_that_does_not_exist_is_refused():
    wrapped = wrapped_model(target_modules=["layers.1.self_attn"], variant="parallel")
    assert [layer.path for layer in layers(wrapped)] == ["model.layers.1.self_attn"]
    with pytest.raises(ValueError, match="not found in the base model"):
        wrapped_model(target_modules=["layers.1.nothing"])


def test_a_model_without_attention_modules_is_refused():
    base = model()
    for layer in base.model.layers:
        layer.other, layer.self_attn = layer.self_attn.q_proj, None
    with pytest.raises(UnsupportedModelError, match="no decoder layer has a child that is an attention module"):
        peft.get_peft_model(base, BottleneckConfig(r=8, variant="houlsby"))


class TestAdapterDrop:
    def test_the_first_layers_get_no_adapter_and_the_file_says_so(self, tmp_path):
        wrapped = wrapped_model(variant="houlsby", drop_layers=1)
        assert sorted({layer.layer_index for layer in layers(wrapped)}) == [1, 2]
        wrapped.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(model(), tmp_path)
        assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)

    def test_layers_are_dropped_at_inference_and_come_back(self):
        wrapped = wrapped_model(variant="houlsby")
        everything, fewer = wrapped(tokens()).logits, wrapped_model(variant="houlsby")
        for layer in layers(fewer):
            if layer.layer_index < 2:
                layer.tuned_bottleneck_up["default"].requires_grad_(False).weight.zero_()
                layer.tuned_bottleneck_up["default"].bias.zero_()
        wrapped.drop_layers(2)
        assert torch.equal(wrapped(tokens()).logits, fewer(tokens()).logits)
        wrapped.drop_layers(0)
        assert torch.equal(wrapped(tokens()).logits, everything)
        with pytest.raises(ConfigError, match="got 4, expected 0 to 3"):
            wrapped.drop_layers(4)

    def test_each_training_step_draws_a_number_of_layers_that_rest(self):
        wrapped = wrapped_model(random_drop_layers=2).train()
        torch.manual_seed(0)
        resting = set()
        for _ in range(12):
            wrapped.zero_grad()
            wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
            resting.add(tuple(layer.tuned_bottleneck_up["default"].weight.grad is None for layer in layers(wrapped)))
        assert resting == {(False, False, False), (True, False, False), (True, True, False)}
        expected = wrapped_model().eval()(tokens()).logits
        assert torch.equal(wrapped.eval()(tokens()).logits, expected)

    @pytest.mark.parametrize("name", ["drop_layers", "random_drop_layers"])
    def test_some_layer_must_be_left(self, name):
        with pytest.raises(ConfigError, match=f"{name} must be less than 3"):
            wrapped_model(**{name: 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"variant": "serial"}, "variant must be houlsby or pfeiffer or parallel, got 'serial'"),
        ({"activation": "tanh"}, "activation must be relu or gelu or silu, got 'tanh'"),
        ({"scaling": 0.0}, "scaling must be greater than 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"drop_layers": -1}, "drop_layers must be at least 0"),
        ({"random_drop_layers": -1}, "random_drop_layers must be at least 0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BottleneckConfig(**options)
