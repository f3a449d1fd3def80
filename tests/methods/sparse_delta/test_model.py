"""Sparse deltas through PEFT: against dense training with a masked gradient, saved and loaded, merged, side by side."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from metier.errors import BaseMismatchError, ConfigError, CorruptDeltaError, DeltaError
from metier.methods.sparse_delta import SparseDeltaConfig, SparseDeltaLayer, choose_entries, prepare
from metier.models.fingerprint import fingerprint_of_any
from metier.models.skeleton import skeleton_of
from metier.models.unwrap import bare_model, base_tensors
from tiny_models import tiny_model

KINDS = ("llama", "deepseek_v2", "mixtral", "gpt_oss")
STEP = 1e-5
"""Differences and whole weights are rounded differently in float32: a few units in the last place of weights near 0.1,
through five steps of AdamW, whose update of a gradient near 0 is as large as any other's."""


def dense_config(**options) -> SparseDeltaConfig:
    return SparseDeltaConfig(**{"density": 0.02, "mask": "random", **options})


def model_of(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    return tiny_model(kind, num_hidden_layers=2, **changes).to(dtype).eval()


def tokens(seed: int = 0):
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(seed))


def train(model, steps: int = 3, *, seed: int = 0, optimizer=None, **options):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, **{"lr": 1e-2, "weight_decay": 0.0, **options})
    for step in range(steps):
        model(input_ids=tokens(seed + step), labels=tokens(seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(model, steps: int = 3, config: SparseDeltaConfig | None = None, **options):
    return train(peft.get_peft_model(model, config or dense_config()), steps, **options).eval()


def layers(model) -> list[SparseDeltaLayer]:
    return [module for module in model.modules() if isinstance(module, SparseDeltaLayer)]


def bits(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().view(torch.uint8) for name, p in base_tensors(bare_model(model))}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_then_trains_and_leaves_the_base_alone(kind):
    model = model_of(kind)
    before, logits = bits(model), model(tokens()).logits
    wrapped = peft.get_peft_model(model, dense_config())
    assert torch.equal(wrapped(tokens()).logits, logits)
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert all("sparse_delta_values_" in name for name in trainable)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == sum(
        wrapped.peft_config["default"].num_entries_by_parameter.values()
    )
    with torch.no_grad():
        start = wrapped(input_ids=tokens(), labels=tokens()).loss
    for _ in range(4):
        train(wrapped, 1, weight_decay=0.1)
    assert wrapped(input_ids=tokens(), labels=tokens()).loss < start - 0.01
    assert all(parameter.grad is None for name, parameter in wrapped.named_parameters() if "sparse_delta" not in name)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, logits)
        raw = {
            n.replace(".base_layer", ""): p.view(torch.uint8) for n, p in model.named_parameters() if "sparse" not in n
        }
        assert equal(raw, before)
    assert equal(bits(wrapped), before)
    assert equal(bits(wrapped.unload()), before)


def masked_dense_training(model, entries, steps, **options):
    """The slow, obvious way: every parameter trains, and a mask takes the gradient of what is not chosen."""
    chosen = {name: p for name, p in model.named_parameters() if name in entries}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in entries)
    optimizer = torch.optim.AdamW(chosen.values(), lr=1e-2, weight_decay=0.0, **options)
    for step in range(steps):
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        for name, parameter in chosen.items():
            mask = torch.zeros(parameter.numel())
            mask[entries[name].long()] = 1
            parameter.grad.mul_(mask.view_as(parameter))
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_dense_training_with_a_masked_gradient(kind):
    # far from 0, AdamW's updates do not turn rounding into whole steps
    options = {"eps": 1e-4}
    wrapped = trained(model_of(kind), 5, **options)
    entries = wrapped.peft_config["default"].entries
    dense = masked_dense_training(model_of(kind), entries, 5, **options)
    base = dict(model_of(kind).named_parameters())
    found = 0
    for layer in layers(wrapped):
        for name in layer.names:
            path = f"{layer.path}.{name}"
            moved = (dict(dense.named_parameters())[path] - base[path]).detach().view(-1)
            torch.testing.assert_close(
                layer.values_of(name)["default"].detach(), moved[entries[path].long()], rtol=0, atol=STEP
            )
            found += 1
    assert found == len(entries)
    torch.testing.assert_close(wrapped(tokens()).logits, dense.eval()(tokens()).logits, rtol=0, atol=1e-4)


def test_the_first_gradient_is_the_dense_one_at_the_entries_to_the_bit():
    wrapped, dense = peft.get_peft_model(model_of(), dense_config()), model_of()
    for model in (wrapped, dense):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad.view(-1) for name, p in dense.named_parameters()}
    for path, indices in wrapped.peft_config["default"].entries.items():
        module, _, name = path.rpartition(".")
        got = bare_model(wrapped).get_submodule(module).values_of(name)["default"].grad
        assert torch.equal(got, gradients[path][indices.long()])


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_other_optimizers_give_what_the_plain_one_gives(options):
    plain, other = trained(model_of(), 3, foreach=False), trained(model_of(), 3, **options)
    torch.testing.assert_close(plain(tokens()).logits, other(tokens()).logits, rtol=0, atol=1e-4)
    assert not torch.equal(other(tokens()).logits, model_of()(tokens()).logits)


_FRESH = """
import sys, torch
import metier.methods.sparse_delta  # before peft
import peft
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(torch.load(sys.argv[3])).logits.detach(), sys.argv[4])
"""


def test_a_saved_adapter_gives_the_same_logits_in_a_fresh_process(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.save(tokens(), tmp_path / "tokens")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "tokens", "logits")]
    subprocess.run([sys.executable, "-c", _FRESH, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), wrapped(tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_it_is_the_same_to_the_bit(kind, low_cpu_mem_usage, tmp_path):
    wrapped = trained(model_of(kind, torch.bfloat16))
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["entries"] is None
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in file.items() if "indices" in name} == {torch.int32}
    assert {tensor.dtype for name, tensor in file.items() if "values" in name} == {torch.float32}
    assert len(file) == 2 * len(config["num_entries_by_parameter"])
    again = peft.PeftModel.from_pretrained(
        model_of(kind, torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)
    again.save_pretrained(tmp_path / "again")
    other = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(file[name], other[name]) for name in file)


def test_loading_over_an_adapter_replaces_its_entries_too(tmp_path):
    wrapped = trained(model_of())
    wrapped.save_pretrained(tmp_path)
    other = trained(model_of(), 1, dense_config(seed=7))
    other.load_adapter(str(tmp_path), "default")
    assert torch.equal(other(tokens()).logits, wrapped(tokens()).logits)
    with other.disable_adapter():
        assert torch.equal(other(tokens()).logits, model_of()(tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_same_logits_and_unmerging_the_same_bits(kind, dtype):
    model = model_of(kind, dtype)
    before = bits(model)
    wrapped = trained(model)
    logits = wrapped(tokens()).logits
    wrapped.merge_adapter()
    assert torch.equal(wrapped(tokens()).logits, logits)
    with pytest.raises(ValueError, match="Cannot delete"):
        wrapped.delete_adapter("default")
    wrapped.unmerge_adapter()
    assert equal(bits(wrapped), before)
    assert torch.equal(wrapped(tokens()).logits, logits)
    wrapped.merge_adapter()
    merged = wrapped.merge_and_unload()
    assert not layers(merged)
    assert torch.equal(merged(tokens()).logits, logits)


def test_unloading_a_merged_adapter_gives_the_base_back():
    model = model_of()
    before = bits(model)
    wrapped = trained(model)
    wrapped.merge_adapter()
    assert equal(bits(wrapped.unload()), before)


def test_merging_another_than_the_active_adapter_leaves_nothing_of_the_active_one():
    wrapped = trained(model_of())
    wrapped.add_adapter("second", dense_config(seed=5, target_modules=["layers.0.mlp.down_proj"]))
    wrapped.set_adapter("second")
    train(wrapped, 2)
    logits = wrapped(tokens()).logits
    wrapped.set_adapter("default")
    assert not torch.equal(wrapped(tokens()).logits, logits)
    assert torch.equal(wrapped.merge_and_unload(adapter_names=["second"])(tokens()).logits, logits)


def test_a_merge_that_is_refused_in_one_layer_happens_in_none():
    model = model_of()
    before = bits(model)
    wrapped = trained(model)
    with torch.no_grad():
        layers(wrapped)[-1].values_of("weight")["default"][0] = float("nan")
    with pytest.raises(DeltaError, match="holds values that are not finite; nothing was merged"):
        wrapped.merge_adapter(safe_merge=True)
    assert equal(bits(wrapped), before)
    with pytest.raises(DeltaError, match=r"adapter_names names \['law'\]"):
        wrapped.merge_adapter(adapter_names=["law"])


def test_two_adapters_do_not_meet_and_one_is_deleted():
    model = model_of()
    before = bits(model)
    wrapped = trained(model)
    first = wrapped(tokens()).logits
    wrapped.add_adapter("second", dense_config(seed=5, density=0.1))
    assert torch.equal(wrapped(tokens()).logits, first)
    wrapped.set_adapter("second")
    assert torch.equal(wrapped(tokens()).logits, model_of()(tokens()).logits)
    train(wrapped, 2)
    second = wrapped(tokens()).logits
    wrapped.set_adapter("default")
    assert torch.equal(wrapped(tokens()).logits, first)
    wrapped.set_adapter("second")
    wrapped.delete_adapter("default")
    assert torch.equal(wrapped(tokens()).logits, second)
    assert {name for layer in layers(wrapped) for name in layer.adapter_names} == {"second"}
    wrapped.delete_adapter("second")
    assert equal(bits(model), before)


def test_active_adapters_add_up_and_both_get_gradients():
    wrapped = trained(model_of(), 1)
    wrapped.add_adapter("second", dense_config(seed=5, density=0.1))
    wrapped.set_adapter("second")
    train(wrapped, 1)
    wrapped.base_model.set_adapter(["default", "second"])
    deltas = {}
    for adapter in ("default", "second"):
        for path, indices in wrapped.peft_config[adapter].entries.items():
            module, _, name = path.rpartition(".")
            dense = deltas.setdefault(path, torch.zeros(bare_model(wrapped).get_submodule(module).size_of(name)))
            dense[indices.long()] += bare_model(wrapped).get_submodule(module).values_of(name)[adapter].detach()
    expected = model_of()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name in deltas:
                parameter += deltas[name].view_as(parameter)
    torch.testing.assert_close(wrapped(tokens()).logits, expected(tokens()).logits, rtol=0, atol=1e-5)
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    values = [p for n, p in wrapped.named_parameters() if "sparse_delta_values" in n]
    assert all(p.grad is not None and p.grad.any() for p in values)


def test_a_reference_model_between_forward_and_backward():
    """As preference training does it: the base's logits under `disable_adapter` while a graph waits."""
    wrapped = trained(model_of()).train()
    loss = wrapped(input_ids=tokens(), labels=tokens()).loss
    with torch.no_grad(), wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, model_of()(tokens()).logits)
    loss.backward()
    got = [p.grad for p in wrapped.parameters() if p.requires_grad]
    wrapped.zero_grad()
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(
        torch.equal(a, p.grad) for a, p in zip(got, (p for p in wrapped.parameters() if p.requires_grad), strict=True)
    )


def test_an_error_in_the_forward_pass_leaves_the_base_whole():
    model = model_of()
    before = bits(model)
    wrapped = trained(model)
    logits = wrapped(tokens()).logits
    hook = model.model.layers[1].mlp.down_proj.base_layer.register_forward_pre_hook(lambda *_: 1 / 0)
    for context in (wrapped.disable_adapter, torch.no_grad):
        with pytest.raises(ZeroDivisionError), context():
            wrapped(tokens())
    hook.remove()
    assert all(isinstance(p, nn.Parameter) for p in wrapped.parameters())
    assert torch.equal(wrapped(tokens()).logits, logits)
    assert equal(bits(wrapped), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    found = []
    for checkpointing in (False, True):
        wrapped = trained(model_of(kind)).train()
        if checkpointing:
            bare_model(wrapped).gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            bare_model(wrapped).enable_input_require_grads()
        train(wrapped, 2, fused=True)
        wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    assert len(found[0]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_bf16_base_has_float32_masters_and_computes_in_bf16():
    wrapped = trained(model_of(dtype=torch.bfloat16))
    assert {p.dtype for n, p in wrapped.named_parameters() if "sparse_delta" in n} == {torch.float32}
    assert wrapped(tokens()).logits.dtype == torch.bfloat16
    seen = []
    layers(wrapped)[0].base_layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
    wrapped(tokens())
    assert seen == [torch.bfloat16]


def test_casting_the_model_casts_the_base_and_not_what_stands_in_it():
    wrapped = trained(model_of())
    wrapped.to(torch.float64)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, model_of(dtype=torch.float64)(tokens()).logits)
    wrapped = trained(model_of())
    wrapped.to(torch.bfloat16)
    logits = wrapped(tokens()).logits
    wrapped.train().eval()  # writes anew
    assert torch.equal(wrapped(tokens()).logits, logits)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_if_asked_tied_or_not(tied, target, tmp_path):
    def base():
        return model_of(tie_word_embeddings=tied)

    config = SparseDeltaConfig(mask="random", num_entries=200, target_modules=[target])
    wrapped = trained(base(), 3, config, eps=1e-4)
    entries = wrapped.peft_config["default"].entries
    assert list(entries) == ["model.embed_tokens.weight" if tied or target == "embed_tokens" else "lm_head.weight"]
    dense = masked_dense_training(base(), entries, 3, eps=1e-4).eval()
    torch.testing.assert_close(wrapped(tokens()).logits, dense(tokens()).logits, rtol=0, atol=1e-4)
    wrapped.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, wrapped(tokens()).logits)
    logits = wrapped(tokens()).logits
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens()).logits, base()(tokens()).logits)
    merged = wrapped.merge_and_unload()
    assert torch.equal(merged(tokens()).logits, logits)
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_who_reads_the_state_or_a_fingerprint_meets_the_base():
    model = model_of()
    before, name = fingerprint_of_any(model), "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    wrapped = trained(model, 3, SparseDeltaConfig(target_kinds=["norm", "linear"], mask="random"))
    logits = wrapped(tokens()).logits
    state = {key: value.clone() for key, value in wrapped.state_dict().items()}
    assert torch.equal(state[name], model_of().model.layers[0].self_attn.q_proj.weight)
    assert fingerprint_of_any(wrapped) == before
    assert torch.equal(wrapped(tokens()).logits, logits)
    wrapped.load_state_dict(state)
    assert torch.equal(wrapped(tokens()).logits, logits)


def test_a_copy_of_a_model_has_a_life_of_its_own():
    wrapped = trained(model_of())
    logits = wrapped(tokens()).logits
    other = copy.deepcopy(wrapped)
    train(other, 2, lr=0.1)
    assert not torch.equal(other(tokens()).logits, logits)
    assert torch.equal(wrapped(tokens()).logits, logits)
    assert equal(bits(other), bits(wrapped))


def test_another_base_is_refused(tmp_path):
    trained(model_of()).save_pretrained(tmp_path)
    other = model_of()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="Load the base that it was trained on"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("missing values", "holds no such tensor, expected shape"),
        ("missing indices", "holds no such tensor, expected shape"),
        ("shape", "expected shape"),
        ("outside", "entries from 0 to 1000000, expected 0 to 1023"),
        ("twice", "name a position twice"),
        ("disorder", "positions are not in order"),
        ("foreign", "holds a tensor that no layer of its configuration has"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_before_anything_is_loaded(breakage, message, tmp_path):
    trained(model_of()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    values = "base_model.model.model.layers.1.self_attn.q_proj.sparse_delta_values_weight"
    indices = values.replace("values", "indices")
    if breakage.startswith("missing"):
        del state[values if "values" in breakage else indices]
    elif breakage == "shape":
        state[values] = state[values][:-1].clone()
    elif breakage == "foreign":
        state[values.replace("layers.1", "layers.7")] = state[values].clone()
    elif breakage == "outside":
        state[indices][0], state[indices][-1] = 0, 1_000_000
    elif breakage == "twice":
        state[indices][1] = state[indices][0]
    else:
        state[indices] = state[indices].flip(0).contiguous()
    save_file(state, path)
    fresh = trained(model_of(), 1)
    before = fresh(tokens()).logits
    with pytest.raises(CorruptDeltaError, match=message) as error:
        fresh.load_adapter(str(tmp_path), "default")
    assert "nothing was loaded" in str(error.value)
    assert torch.equal(fresh(tokens()).logits, before)


def test_a_configuration_without_its_file_trains_nothing(tmp_path):
    trained(model_of()).save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    wrapped = peft.get_peft_model(model_of(), config)
    with pytest.raises(DeltaError, match="says how many entries it has, and not which"):
        wrapped(tokens())


def test_one_configuration_serves_two_models():
    config = prepare(model_of(), dense_config(mask="fisher"), [{"input_ids": tokens(), "labels": tokens()}])
    one, two = trained(model_of(), config=config), trained(model_of(), config=config)
    assert torch.equal(one(tokens()).logits, two(tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["fisher", "norm", "bias"])
def test_on_the_meta_device_there_are_as_many_entries(kind, mask):
    options = {"density": 0.02} if mask == "fisher" else {}
    config = tiny_model(kind).config
    with torch.device("meta"):
        wrapped = peft.get_peft_model(skeleton_of(config, name=kind), SparseDeltaConfig(mask=mask, **options))
    values = [p for n, p in wrapped.named_parameters() if "sparse_delta" in n]
    assert all(p.is_meta for p in values)
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    chosen = choose_entries(tiny_model(kind), SparseDeltaConfig(mask=mask, **options), batches)
    assert sum(p.numel() for p in values) == sum(map(len, chosen.values()))


def test_an_entry_of_the_users_own():
    entries = {"model.norm.weight": torch.tensor([5, 2]), "model.layers.0.mlp.down_proj.weight": torch.tensor([7])}
    wrapped = trained(model_of(), config=SparseDeltaConfig(mask="given", entries=entries))
    assert wrapped.get_nb_trainable_parameters()[0] == 3
    merged, base = wrapped.merge_and_unload(), model_of()
    assert (merged.model.norm.weight != base.model.norm.weight).nonzero().squeeze(1).tolist() == [2, 5]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model.norm.weights": torch.tensor([1])}, "entries names 'model.norm.weights', which is no parameter"),
        ({"model.norm.weight": torch.tensor([1, 32])}, "entries from 1 to 32, expected 0 to 31"),
        ({"model.norm.weight": torch.tensor([1, 1])}, "name a position twice"),
        ({"model.norm.weight": torch.tensor([])}, "must be whole numbers and at least one"),
        ({"model.layers.0.mlp.down_proj.bias": torch.tensor([1])}, "trains 1 entries, expected all"),
    ],
)
def test_entries_that_do_not_fit_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        peft.get_peft_model(model_of(), SparseDeltaConfig(mask="given", entries=entries))


def test_mixing_adapters_in_a_batch_is_refused():
    with pytest.raises(ConfigError, match="answer a whole batch alike"):
        trained(model_of())(tokens(), adapter_names=["default", "__base__"])
