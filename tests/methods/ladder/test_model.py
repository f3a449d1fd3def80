"""Ladders beside tiny decoders: against the formulas, padded, packed, generating, saved, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GemmaConfig, LlamaConfig, MistralConfig, Qwen3Config

from metier.data.collate import PaddingFreeCollator
from metier.data.encode import Encoded
from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError, UnsupportedModelError
from metier.methods.ladder import LadderConfig, LadderLayer, LadderTop
from metier.models.fingerprint import mark_skeleton
from metier.models.layers import layer_stacks
from tiny_models import tiny_model

_spec = importlib.util.spec_from_file_location("ladder_reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

DENSE = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma": GemmaConfig, "mistral": MistralConfig}
MOE = ("deepseek_v2", "mixtral", "gpt_oss")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""float32, sums in another order."""


def dense_model(kind: str = "llama", *, num_layers: int = 2, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    more = {"sliding_window": 4} if kind == "mistral" else {}
    config = DENSE[kind](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def any_model(kind: str):
    return dense_model(kind) if kind in DENSE else tiny_model(kind).eval()


def config(**changes) -> LadderConfig:
    return LadderConfig(**{"reduction": 4, "num_heads": 2, **changes})


def tokens(seed: int = 0, num_rows: int = 2, length: int = 9):
    return torch.randint(3, 64, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """With values of an adapter that do something, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ladder_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def laddered(kind: str = "llama", **changes):
    return shaken(peft.get_peft_model(any_model(kind), config(**changes))).eval()


def adapter_parameters(model):
    return {name: p for name, p in model.named_parameters() if "ladder_" in name}


@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_a_new_ladder_changes_no_bit_then_trains_and_leaves_the_base_alone(kind):
    model = any_model(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(tokens()).logits
    wrapped = peft.get_peft_model(model, config())
    assert torch.equal(wrapped(tokens()).logits, logits)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trained) == len(adapter_parameters(wrapped))
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1), []
    for _ in range(8):
        losses.append(wrapped(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    base = {n.replace("base_layer.", ""): p for n, p in wrapped.get_base_model().named_parameters()}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, logits)
    assert torch.equal(wrapped.unload()(tokens()).logits, logits)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("kind", "stride"), [("llama", 1), ("qwen3", 1), ("gemma", 2), ("deepseek_v2", 2)])
def test_outputs_and_gradients_are_those_of_the_formulas(kind, stride):
    wrapped = laddered(kind, layer_stride=stride)
    base = wrapped.get_base_model()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    labels = tokens().masked_fill(mask == 0, -100)
    out = wrapped(input_ids=tokens(), attention_mask=mask, labels=labels)
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in adapter_parameters(wrapped).items()}
    wrapped.zero_grad()

    with torch.no_grad(), wrapped.disable_adapter():
        hidden = base.model(tokens(), attention_mask=mask, output_hidden_states=True).hidden_states[:-1]
        last = []
        hook = base.model.norm.base_layer.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        base.model(tokens(), attention_mask=mask)
        hook.remove()
    states = [*hidden, last[0]]
    layers = [layer for layer in wrapped.modules() if isinstance(layer, LadderLayer)]
    rungs = [(layer.number, layer.ladder_rung["default"]) for layer in layers if "default" in layer.ladder_rung]
    assert [number for number, _ in rungs] == {1: [0, 1], 2: [1] if kind == "gemma" else [1, 2]}[stride]
    head = base.model.norm.ladder_head["default"]
    total, losses = 0, []
    for row, length in enumerate(mask.sum(1).tolist()):
        added = reference.side_of_record(rungs, head, [state[row, :length] for state in states])
        logits = base.lm_head(base.model.norm.base_layer(states[-1][row, :length] + added))
        torch.testing.assert_close(out.logits[row, :length], logits, **CLOSE)
        losses.append(nn.functional.cross_entropy(logits[:-1], tokens()[row, 1:length], reduction="sum"))
        total += length - 1
    (sum(losses) / total).backward()
    for name, parameter in adapter_parameters(wrapped).items():
        torch.testing.assert_close(found[name], parameter.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert all(grad.abs().max() > 0 for grad in found.values())


def bytes_saved(model) -> int:
    """Most bytes that autograd keeps at once for a backward pass: each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    batch = tokens(num_rows=2, length=32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # the output layer is every method's, and holds no more than logits of the whole vocabulary
        hidden = model.get_base_model().model(batch, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("kind", "stride"), [("llama", 1), ("mixtral", 2)])
def test_no_module_of_the_backbone_gets_or_keeps_anything_of_autograd(kind, stride):
    wrapped = laddered(kind, layer_stride=stride).train()
    wrapped.enable_input_require_grads()  # as for checkpointing: whatever comes in wants a gradient
    seen, inside, saved_inside = [], [0], []

    def enter(*_):
        inside[0] += 1

    def leave(module, _, out):
        inside[0] -= 1
        out = out[0] if isinstance(out, tuple) else out
        seen.append((type(module).__name__, out.requires_grad))

    for layer in [m for m in wrapped.modules() if isinstance(m, LadderLayer)]:
        for module in layer.base_layer.modules():
            if module is layer.base_layer or not isinstance(module, nn.ModuleList):
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave)

    def pack(tensor):
        if inside[0]:
            saved_inside.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = wrapped(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    assert len(seen) > 10
    assert not any(requires_grad for _, requires_grad in seen)
    assert saved_inside == []
    loss.backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(wrapped).values())


def wide_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes))


def test_a_ladder_keeps_a_fraction_of_what_lora_keeps_for_the_backward_pass():
    ladder = bytes_saved(peft.get_peft_model(wide_model(), LadderConfig()))
    lora = bytes_saved(peft.get_peft_model(wide_model(), peft.LoraConfig(r=8, target_modules="all-linear")))
    assert ladder < 0.3 * lora, (ladder, lora)


def test_padding_on_either_side_changes_nothing():
    wrapped, batch = laddered(), tokens()
    alone = wrapped(batch[1:, :6]).logits[0]
    for left in (0, 3):
        mask = torch.zeros(2, 9, dtype=torch.int64)
        mask[0], mask[1, left : left + 6] = 1, 1
        padded = batch.clone()
        padded[1] = 0
        padded[1, left : left + 6] = batch[1, :6]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = wrapped(padded, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(logits[1, left : left + 6], alone, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "mistral", "deepseek_v2"])
def test_records_that_share_a_row_do_not_see_each_other(kind):
    wrapped = laddered(kind)
    records = [tokens(seed, 1, length)[0].tolist() for seed, length in enumerate((9, 5, 3))]
    batch = PaddingFreeCollator(0)([Encoded(ids, ids, "") for ids in records])
    assert batch["input_ids"].shape == (2, 9)
    logits = wrapped(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    places = [(0, 0), (1, 0), (1, 5)]
    for ids, (row, start) in zip(records, places, strict=True):
        alone = wrapped(torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, start : start + len(ids)], alone, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mistral", *MOE])
def test_generation_with_a_cache_is_generation_without(kind):
    wrapped = laddered(kind)
    prompt = {"input_ids": tokens(length=5), "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])}
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_cache = wrapped.generate(**prompt, **options, use_cache=True)
    without = wrapped.generate(**prompt, **options, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_beam_search_reorders_the_side_network_s_cache_too():
    wrapped = laddered()
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    with_cache = wrapped.generate(input_ids=tokens(length=5), **options, use_cache=True)
    assert torch.equal(with_cache, wrapped.generate(input_ids=tokens(length=5), **options, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("made", ["by the model", "empty", "by its configuration"])
def test_several_tokens_after_a_cache_and_a_cropped_cache(made):
    wrapped, batch = laddered(), tokens()
    whole = wrapped(batch).logits
    given = {"empty": DynamicCache, "by its configuration": lambda: DynamicCache(config=wrapped.config)}
    cache = wrapped(batch[:, :4], past_key_values=given.get(made, lambda: None)(), use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    torch.testing.assert_close(wrapped(batch[:, 4:], past_key_values=cache).logits, whole[:, 4:], **CLOSE)
    cache.crop(-3)
    torch.testing.assert_close(wrapped(batch[:, 6:], past_key_values=cache).logits, whole[:, 6:], **CLOSE)
    torch.testing.assert_close(wrapped(batch[:, 4:], past_key_values=copied).logits, whole[:, 4:], **CLOSE)


def test_a_cache_that_another_adapter_filled_is_refused():
    wrapped = laddered()
    wrapped.add_adapter("second", config())
    cache = wrapped(tokens(), use_cache=True).past_key_values
    wrapped.set_adapter("second")
    with pytest.raises(DeltaError, match=r"holds 9 tokens of the backbone, but 0 of ladder 'second'"):
        wrapped(tokens(), past_key_values=cache)


def test_a_cache_of_a_fixed_size_is_refused():
    with pytest.raises(UnsupportedModelError, match="expected one that grows"):
        laddered().generate(input_ids=tokens(), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    found = []
    for checkpointing in (False, True):
        wrapped = laddered().train()
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            wrapped.enable_input_require_grads()
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in adapter_parameters(wrapped).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_base_in_bfloat16_has_masters_in_float32_and_computes_in_its_own_dtype():
    model = dense_model(dtype=torch.bfloat16)
    logits = model(tokens()).logits
    wrapped = peft.get_peft_model(model, config())
    assert torch.equal(wrapped(tokens()).logits, logits)
    assert {p.dtype for p in adapter_parameters(wrapped).values()} == {torch.float32}
    shaken(wrapped)
    out = wrapped(input_ids=tokens(), labels=tokens())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(wrapped).values())


def test_it_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense_model().config)
        mark_skeleton(model)
        wrapped = peft.get_peft_model(model, config())
    assert all(p.is_meta for p in wrapped.parameters())
    assert len(layer_stacks(wrapped)[0]) == 2
    assert wrapped(tokens().to("meta")).logits.is_meta


_FRESH = """
import sys, torch, metier, peft
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(torch.load(sys.argv[3])).logits.detach(), sys.argv[4])
"""


def test_a_saved_ladder_gives_the_same_logits_in_a_fresh_process(tmp_path):
    model = dense_model()
    model.save_pretrained(tmp_path / "base")
    wrapped = shaken(peft.get_peft_model(model, config()))
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.save(tokens(), tmp_path / "tokens")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "tokens", "logits")]
    subprocess.run([sys.executable, "-c", _FRESH, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), wrapped(tokens()).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_restores_every_bit(low_cpu_mem_usage, tmp_path):
    wrapped = laddered("qwen3", layer_stride=2)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(dense_model("qwen3"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)


@pytest.mark.parametrize("breakage", ["missing", "foreign", "shape"])
def test_a_file_that_does_not_fit_is_refused_before_anything_is_loaded(breakage, tmp_path):
    laddered().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = "base_model.model.model.layers.1.ladder_rung.down"
    if breakage == "missing":
        del state[name]
    elif breakage == "foreign":
        state["base_model.model.model.layers.7.ladder_rung.down"] = state[name].clone()
    else:
        state[name] = state[name][:-1].contiguous()
    save_file(state, path)
    fresh = laddered()
    before = fresh(tokens()).logits
    with pytest.raises(CorruptDeltaError, match="nothing was loaded"):
        fresh.load_adapter(str(tmp_path), "default")
    assert torch.equal(fresh(tokens()).logits, before)


def test_another_base_is_refused(tmp_path):
    laddered().save_pretrained(tmp_path)
    other = dense_model()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="Load the base that it was trained on"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_by_name(verb):
    wrapped = laddered()
    logits = wrapped(tokens()).logits
    with pytest.raises(DeltaError, match="cannot be merged"):
        getattr(wrapped, verb)()
    assert torch.equal(wrapped(tokens()).logits, logits)


def test_two_ladders_of_different_widths_switched_summed_and_deleted():
    wrapped = laddered()
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", config(reduction=8, num_heads=1, layer_stride=2))
    assert torch.equal(wrapped(tokens()).logits, first)
    shaken(wrapped, seed=2)
    first = wrapped(tokens()).logits
    wrapped.set_adapter("second")
    second = wrapped(tokens()).logits
    wrapped.base_model.set_adapter(["default", "second"])
    both = wrapped(tokens()).logits
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in ((first, second), (first, both), (second, both)))
    wrapped.set_adapter("default")
    assert {p.requires_grad for n, p in adapter_parameters(wrapped).items() if "second" in n} == {False}
    wrapped.delete_adapter("second")
    assert torch.equal(wrapped(tokens()).logits, first)
    assert not any("second" in name for name in adapter_parameters(wrapped))


def test_a_copied_model_is_a_model_of_its_own():
    wrapped = laddered()
    logits = wrapped(tokens()).logits
    copied = copy.deepcopy(wrapped)
    ladders = [{id(m.ladder) for m in x.modules() if isinstance(m, LadderLayer | LadderTop)} for x in (wrapped, copied)]
    assert len(ladders[0]) == len(ladders[1]) == 1
    assert ladders[0] != ladders[1]
    assert torch.equal(copied(tokens()).logits, logits)


def test_nothing_is_held_between_passes():
    wrapped = laddered()
    ladder = wrapped.get_base_model().model.norm.ladder
    wrapped(tokens(), use_cache=True)
    assert ladder._climbs == {}
    with wrapped.disable_adapter():
        wrapped(tokens(), use_cache=True)
    assert ladder._climbs == {}


def test_a_layer_called_by_itself_is_refused():
    layer = laddered().get_base_model().model.layers[0]
    rotary = laddered().get_base_model().model.rotary_emb
    hidden = torch.randn(1, 3, 32)
    with pytest.raises(UnsupportedModelError, match="Call the model as a whole"):
        layer(hidden, position_embeddings=rotary(hidden, torch.arange(3)[None]))


def test_masks_that_are_no_padding_masks_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"expected \(rows, tokens\) = \(2, 9\)"):
        laddered()(tokens(), attention_mask=torch.zeros(2, 1, 9, 9))


def test_a_model_without_a_last_norm_is_refused():
    model = dense_model()
    model.model.strange, model.model.norm = model.model.norm, None
    with pytest.raises(UnsupportedModelError, match=r"no norm follows the layers of model\.layers"):
        peft.get_peft_model(model, config())


def test_other_targets_are_refused():
    with pytest.raises(ConfigError, match=r"differs in model\.layers\.0, model\.norm"):
        peft.get_peft_model(dense_model(), config(target_modules=["model.layers.1"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "reduction must be a whole number of at least 1, got 0"),
        ({"num_heads": 2.0}, "num_heads must be a whole number"),
        ({"layer_stride": -1}, "layer_stride must be"),
        ({"mlp_factor": 0.0}, "mlp_factor must be greater than 0"),
        ({"temperature": float("nan")}, "temperature must be greater than 0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LadderConfig(**options)


def test_a_width_that_cannot_be_split_into_heads_is_refused_before_anything_is_made():
    model = dense_model()
    with pytest.raises(ConfigError, match="width 8, which cannot be split into num_heads=3"):
        peft.get_peft_model(model, config(num_heads=3))
    assert not any(isinstance(module, LadderLayer | LadderTop) for module in model.modules())
