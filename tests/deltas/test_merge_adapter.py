"""Adapters of PEFT's own methods merged by `export`: those that are changes of weights, and none that answers otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import metier
from deltas.made import logits
from deltas.test_stream_merge import made_folder, tensors_in
from metier.deltas.export import export
from metier.deltas.probe import largest_difference
from metier.errors import BaseMismatchError, CorruptDeltaError, DeltaError
from metier.methods.bottleneck import BottleneckConfig
from metier.methods.prefix import PrefixConfig
from metier.methods.sparse_delta import SparseDeltaConfig
from tiny_models import tiny_model


def lora_on(base: Path, folder: Path, config: peft.PeftConfig) -> torch.Tensor:
    """An adapter of which every value has moved, and what the base answers with it."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(metier.load(base).model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return logits(wrapped)


ADAPTERS = {
    "lora": ("llama", peft.LoraConfig(target_modules=["q_proj", "down_proj"])),
    "dora": ("llama", peft.LoraConfig(target_modules=["v_proj"], use_dora=True)),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "oft": ("llama", peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, r=0)),
    "adalora": ("llama", peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)),
    "ln": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "lora_on_experts": (
        "olmoe",
        peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_pefts_own_is_merged_and_answers_the_same(kind: str, tmp_path: Path) -> None:
    family, config = ADAPTERS[kind]
    base = made_folder(tmp_path / "base", family)
    want = lora_on(base, tmp_path / "adapter", config)
    said = export(tmp_path / "adapter", base, tmp_path / "out", to="merged")
    got, plain = logits(metier.load(tmp_path / "out").model), logits(metier.load(base).model)
    assert largest_difference(got, want) < 1e-4 * largest_difference(plain, want)
    assert tensors_in(tmp_path / "out").keys() == tensors_in(base).keys()
    assert said[-1] == "Loaded again, the checkpoint answers a fixed batch of tokens as base and adapter did."
    facts = json.loads((tmp_path / "out" / "metier_merge.json").read_text())
    assert facts["peft_type"] == str(config.peft_type.value)


NOT_MERGED = {
    "bottleneck": (BottleneckConfig(r=4), r"BOTTLENECK: .*cannot be merged\. Serve it beside its base"),
    "prefix": (PrefixConfig(), r"METIER_PREFIX: .*cannot be merged\. Serve it beside its base"),
    "prompt": (
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        r"PROMPT_TUNING: it is no change of the base's weights, so it cannot be merged\. Serve it beside its base",
    ),
}


@pytest.mark.parametrize("kind", NOT_MERGED)
def test_a_method_that_is_no_change_of_weights_is_refused_before_a_base_is_loaded(kind: str, tmp_path: Path) -> None:
    config, message = NOT_MERGED[kind]
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(DeltaError, match=message):
        export(tmp_path / "adapter", "no/base", tmp_path / "out", to="merged")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made_folder(tmp_path / "base", "llama")
    lora_on(base, tmp_path / "adapter", peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda *_, **__: None)
    with pytest.raises(DeltaError, match=r"merged into its base it answers otherwise: logits differ by"):
        export(tmp_path / "adapter", base, tmp_path / "out", to="merged")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []


def test_what_peft_cannot_merge_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made_folder(tmp_path / "base", "llama")
    lora_on(base, tmp_path / "adapter", peft.LoraConfig(target_modules=["q_proj"]))

    def cannot(*_: object, **__: object) -> None:
        raise NotImplementedError("not with this layer")

    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", cannot)
    with pytest.raises(DeltaError, match=r"LORA: PEFT cannot merge it: not with this layer\nServe it beside its base"):
        export(tmp_path / "adapter", base, tmp_path / "out", to="merged")


@pytest.mark.parametrize("how", ["other_base", "foreign", "lacking", "nan", "pickle"])
def test_an_adapter_whose_tensors_do_not_fit_is_refused(how: str, tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "llama")
    lora_on(base, tmp_path / "adapter", peft.LoraConfig(target_modules=["q_proj"]))
    path, kind, message = tmp_path / "adapter" / "adapter_model.safetensors", BaseMismatchError, "cannot be put on base"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if how == "other_base":
        tiny_model("llama", hidden_size=64).save_pretrained(base)
    elif how == "foreign":
        tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()
        message = "has no place for 1 of the adapter's tensors, such as"
    elif how == "lacking":
        del tensors[name]
        message = "cannot be put on base .*: Found missing adapter keys"
    elif how == "nan":
        tensors[name][0, 0], kind, message = torch.nan, CorruptDeltaError, "not finite; nothing was merged"
    else:
        (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"")
        kind, message = CorruptDeltaError, "a pickle, which can run code"
    save_file(tensors, path)
    if how == "pickle":
        path.unlink()
    with pytest.raises(kind, match=message):
        export(tmp_path / "adapter", base, tmp_path / "out", to="merged")
    assert not (tmp_path / "out").exists()


def test_a_lora_on_a_bf16_base_is_merged_in_bf16(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "llama", torch.bfloat16)
    lora_on(base, tmp_path / "adapter", peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    export(tmp_path / "adapter", base, tmp_path / "out", to="merged")
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_merge_that_needs_a_switch_in_the_configuration_sets_it(tmp_path: Path) -> None:
    base = made_folder(tmp_path / "base", "llama")
    want = lora_on(base, tmp_path / "adapter", SparseDeltaConfig(mask="bias"))
    export(tmp_path / "adapter", base, tmp_path / "out", to="merged")
    torch.testing.assert_close(logits(metier.load(tmp_path / "out").model), want, rtol=1e-4, atol=1e-5)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out"))
    assert after == {**before, "attention_bias": True, "mlp_bias": True}
