"""Modules trained whole beside the experts: all of a group moves and nothing else, and what is saved, merged and served
is what was trained."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import metier
from metier.deltas.compose import compose
from metier.deltas.compress import compress
from metier.deltas.inspect import inspect
from metier.deltas.merge import merge
from metier.deltas.read import read_delta
from metier.deltas.save import save_delta
from metier.deltas.verify import verify
from metier.errors import ConfigError, CorruptDeltaError, DeltaError, SelectionError, UnsupportedModelError
from metier.methods.esft import EsftConfig
from metier.methods.expert_lora import ExpertLoraConfig
from metier.models.foreign import follow_contract
from metier.models.groups import GROUPS, group_paths
from metier.models.unwrap import base_tensors
from metier.routing.selection import ExpertSelection
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

# rows of an expert are multiples of 64 bytes, as in every real model
WIDE = {"mixtral": {"intermediate_size": 32}, "gpt_oss": {"intermediate_size": 32}}
WIDE |= {"deepseek_v2": {"moe_intermediate_size": 32}, "llama4_text": {"intermediate_size": 32}}
EXPERTS = {1: [0, 3], 2: [1]}
HAVE = [(family, group) for family in WIDE for group in GROUPS if group != "shared_experts"]
HAVE += [("deepseek_v2", "shared_experts"), ("llama4_text", "shared_experts"), ("qwen2_moe", "shared_experts")]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32, sums in another order."""


def base_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    if family == "qwen2_moe":
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "qwen2_moe",
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
        )
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = tiny_model(family, **WIDE[family]).to(dtype)
    follow_contract(model)
    return model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (4, 21), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens(9), use_cache=False).logits


def train(model: nn.Module, learning_rate: float = 1e-2) -> None:
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.5
    )
    for step in range(3):
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of_base(model: nn.Module) -> dict[str, Tensor]:
    root = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {name: tensor.detach().clone() for name, tensor in base_tensors(root)}


def trained(
    family: str, groups: list[str], dtype: torch.dtype = torch.float32
) -> tuple[peft.PeftModel, dict[str, Tensor], Tensor]:
    """An adapter after training; the base's tensors and logits from before."""
    model = base_model(family, dtype)
    before, plain = state_of_base(model), logits(model)
    wrapped = peft.get_peft_model(model, EsftConfig(experts=EXPERTS, also_train=groups))
    train(wrapped)
    return wrapped, before, plain


@pytest.mark.parametrize(("family", "group"), HAVE)
def test_all_of_a_group_moves_and_of_the_base_not_a_bit(family: str, group: str) -> None:
    wrapped, before, plain = trained(family, [group])
    after = state_of_base(wrapped)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    saved = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    paths = group_paths(wrapped, group)
    whole = {
        name for path in paths for name, _ in base_tensors(wrapped.get_base_model()) if name.startswith(f"{path}.")
    }
    parameters = {name for name, _ in nn.Module.named_parameters(base_model(family))}
    assert whole & parameters
    for name in whole & parameters:
        assert not torch.equal(saved[f"base_model.model.{name}"], before[name]), f"{name} did not move"
    rows = {name for name in saved if "esft_" in name}
    assert {name.removeprefix("base_model.model.") for name in saved.keys() - rows} == whole & parameters
    assert not torch.equal(logits(wrapped), plain)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), plain)


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_no_bit_of_an_answer_is_changed(family: str, dtype: torch.dtype) -> None:
    model = base_model(family, dtype)
    plain = logits(model)
    config = EsftConfig(experts=EXPERTS, also_train=["router", "attention", "norms"])
    assert torch.equal(logits(peft.get_peft_model(model, config)), plain)


def test_masters_are_float32_and_the_model_computes_in_the_bases_dtype() -> None:
    wrapped, _, _ = trained("deepseek_v2", list(GROUPS), torch.bfloat16)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert logits(wrapped).dtype == torch.bfloat16


@pytest.mark.parametrize("config_class", [EsftConfig, ExpertLoraConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_verified_and_merged_it_answers_the_same(
    config_class: type[peft.PeftConfig], dtype: torch.dtype, tmp_path: Path
) -> None:
    base_model("deepseek_v2", dtype).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = metier.load(tmp_path / "base")
    wrapped = peft.get_peft_model(base.model, config_class(experts=EXPERTS, also_train=list(GROUPS)))
    train(wrapped, learning_rate=3e-3)
    want = logits(wrapped)
    save_delta(wrapped, tmp_path / "adapter")
    wrapped.save_pretrained(tmp_path / "by_peft")
    for folder in ("adapter", "by_peft"):
        loaded = peft.PeftModel.from_pretrained(metier.load(tmp_path / "base").model, str(tmp_path / folder))
        assert torch.equal(logits(loaded), want)
    report = verify(tmp_path / "adapter", metier.load(tmp_path / "base"))
    assert [check for check in report.checks if check.status != "passed"] == []
    merge(tmp_path / "adapter", metier.load(tmp_path / "base"), tmp_path / "merged")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype))
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, **CLOSE)
    elif config_class is EsftConfig:
        assert torch.equal(got, want)
    assert inspect(tmp_path / "adapter").also_train == GROUPS


def test_merging_into_a_loaded_base_gives_it_back_as_it_was(tmp_path: Path) -> None:
    wrapped, _, _ = trained("mixtral", ["router", "attention", "norms"])
    wrapped.save_pretrained(tmp_path / "adapter")
    model = base_model("mixtral")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = metier.load(tmp_path / "base")
    before = state_of_base(base.model)
    merge(tmp_path / "adapter", base, tmp_path / "merged")
    after = state_of_base(base.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_unloaded_it_is_the_base_again_and_merged_it_is_what_was_trained() -> None:
    wrapped, before, plain = trained("deepseek_v2", list(GROUPS))
    want = logits(wrapped)
    merged = wrapped.merge_and_unload()
    assert not any("modules_to_save" in name for name, _ in merged.named_parameters())
    assert torch.equal(logits(merged), want)
    wrapped, before, plain = trained("deepseek_v2", list(GROUPS))
    base = wrapped.unload()
    after = state_of_base(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(base), plain)


def test_two_adapters_keep_their_own_copies() -> None:
    wrapped, _, plain = trained("deepseek_v2", ["router", "norms"])
    first = logits(wrapped)
    wrapped.add_adapter("other", EsftConfig(experts={1: [2]}, also_train=["attention", "norms"]))
    assert {p.requires_grad for n, p in wrapped.named_parameters() if "modules_to_save.default" in n} == {True}
    assert {p.requires_grad for n, p in wrapped.named_parameters() if "modules_to_save.other" in n} == {False}
    wrapped.set_adapter("other")
    assert torch.equal(logits(wrapped), plain)
    train(wrapped)
    assert not torch.equal(logits(wrapped), plain)
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), first)
    wrapped.delete_adapter("other")
    assert torch.equal(logits(wrapped), first)


def test_a_loaded_adapter_wants_gradients_only_where_it_is_to_be_trained(tmp_path: Path) -> None:
    wrapped, _, _ = trained("deepseek_v2", ["router"])
    wrapped.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        loaded = peft.PeftModel.from_pretrained(base_model("deepseek_v2"), str(tmp_path), is_trainable=is_trainable)
        wants = {p.requires_grad for n, p in loaded.named_parameters() if "modules_to_save" in n or "esft_" in n}
        assert wants == {is_trainable}


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = base_model("deepseek_v2")
        wrapped = peft.get_peft_model(model, EsftConfig(experts=EXPERTS, also_train=list(GROUPS))).train()
        if checkpointing:
            wrapped.enable_input_require_grads()
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[0], gradients[1], **CLOSE)


def test_a_group_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"shared_experts: MixtralForCausalLM has no such modules.*\n.*Leave"
    ):
        peft.get_peft_model(base_model("mixtral"), EsftConfig(experts=EXPERTS, also_train=["shared_experts"]))


@pytest.mark.parametrize("config_class", [EsftConfig, ExpertLoraConfig])
def test_an_unknown_group_is_refused_with_the_nearest(config_class: type[peft.PeftConfig]) -> None:
    with pytest.raises(ConfigError, match=r"also_train: got 'routers', .*Did you mean 'router'\?"):
        config_class(experts=EXPERTS, also_train=["norms", "routers"])


def test_a_selection_file_can_want_shared_experts_but_not_everything() -> None:
    selection = ExpertSelection(experts={1: (0, 3)}, shared_experts=True)
    config = EsftConfig.from_selection(selection, also_train=["norms"])
    assert config.also_train == ["shared_experts", "norms"]
    everything = ExpertSelection(experts={1: (0, 3)}, non_expert_modules=True)
    with pytest.raises(SelectionError, match=r"embeddings and the output layer included.\nSet it to false and name"):
        EsftConfig.from_selection(everything)


def test_a_batch_that_mixes_adapters_refuses_whole_modules() -> None:
    wrapped, _, _ = trained("deepseek_v2", ["norms"])
    wrapped.eval()
    with pytest.raises(DeltaError, match=r"\['default'\] train whole modules beside experts"):
        wrapped(input_ids=tokens(), adapter_names=["default", "__base__", "default", "__base__"])


@pytest.mark.parametrize("how", ["missing", "misshapen"])
def test_peft_loads_nothing_of_a_file_that_lacks_a_parameter(how: str, tmp_path: Path) -> None:
    wrapped, _, _ = trained("deepseek_v2", ["router", "norms"])
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.gate.weight"
    value = tensors.pop(name)
    if how == "misshapen":
        tensors[name] = value[:-1].clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        CorruptDeltaError, match=r"(?s)layers\.1\.mlp\.gate\.weight: the delta holds .*nothing was loaded"
    ):
        peft.PeftModel.from_pretrained(base_model("deepseek_v2"), str(tmp_path))


def test_verify_names_a_missing_a_foreign_and_an_unmoved_parameter(tmp_path: Path) -> None:
    base_model("deepseek_v2").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(
        metier.load(tmp_path / "base").model, EsftConfig(experts=EXPERTS, also_train=["router", "norms"])
    )
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, prefix = load_file(file), "base_model.model.model."
    base = metier.load(tmp_path / "base")

    def failures() -> str:
        report = verify(tmp_path / "adapter", base)
        return " ".join(check.sentence for check in report.checks if check.status == "failed")

    own = f"{prefix}layers.1.mlp.gate.weight"
    save_file({**tensors, own: base.model.model.layers[1].mlp.gate.weight.detach()}, file)
    assert "1 rows are the base's to the bit: model.layers.1.mlp.gate.weight" in failures()
    save_file({name: t for name, t in tensors.items() if name != own}, file)
    assert "model.layers.1.mlp.gate: got no tensor, expected the parameters of a module" in failures()
    save_file({**tensors, f"{prefix}layers.0.mlp.up_proj.weight": torch.zeros(2)}, file)
    assert "layers.0.mlp.up_proj.weight', which is none of the rows" in failures()
    save_file({**tensors, f"{prefix}norm.bias": torch.zeros(32)}, file)
    assert "model.norm.bias: got shape [32], expected no such tensor" in failures()
    save_file({**tensors, f"{prefix}norm.weight": torch.full((32,), torch.inf)}, file)
    assert "Not so in model.norm.weight" in failures()


def test_what_knows_routed_experts_only_refuses_such_a_delta(tmp_path: Path) -> None:
    wrapped, _, _ = trained("deepseek_v2", ["norms"])
    wrapped.save_pretrained(tmp_path / "adapter")
    assert read_delta(tmp_path / "adapter").config.also_train == ("norms",)
    base = metier.load("embedded", dtype="float32")
    for action in (
        lambda: compress(tmp_path / "adapter", base, tmp_path / "out", method="bf16"),
        lambda: compose([tmp_path / "adapter"], base, tmp_path / "out"),
    ):
        with pytest.raises(
            DeltaError, match=r"the delta replaces model\.layers\.0\.\S+ too, but \w+ knows routed experts"
        ):
            action()
