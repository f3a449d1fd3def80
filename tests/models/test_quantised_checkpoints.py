"""Checkpoints in MXFP4 and FP8 are loaded as the weights that they stand for, whole and weight by weight."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import metier
from metier.memory.frozen_model import frozen_weights, load_frozen
from tiny_models import tiny_model, tiny_tokenizer

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""What the three bits after the sign stand for."""


def _saved(family: str, folder: Path, quantise, quantization_config: dict[str, object]) -> Path:
    """A checkpoint whose tensors `quantise` has changed, and the configuration that says so."""
    # sizes that torch's grouped products take in bfloat16
    size = "intermediate_size" if family == "gpt_oss" else "moe_intermediate_size"
    tiny_model(family, hidden_size=64, **{size: 32}).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file(
        quantise(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config}))
    return folder


def _mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, weight in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, num_inputs, num_outputs = weight.shape
            shape = (num_experts, num_outputs, num_inputs // 32)
            made[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
            made[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
        else:
            made[name] = weight
    return made


def _fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, weight in tensors.items():
        made[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().max() / 448
            made[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            made[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
    return made


@pytest.fixture(params=["mxfp4", "fp8"])
def checkpoint(request, tmp_path) -> Path:
    if request.param == "mxfp4":
        return _saved("gpt_oss", tmp_path / "base", _mxfp4, {"quant_method": "mxfp4"})
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return _saved("qwen3_moe", tmp_path / "base", _fp8, fp8)


def _tokens() -> Tensor:
    return torch.randint(6, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def test_mxfp4_is_read_as_its_definition_says(tmp_path):
    folder = _saved("gpt_oss", tmp_path / "base", _mxfp4, {"quant_method": "mxfp4"})
    stored = load_file(folder / "model.safetensors")
    model = metier.load(folder).model
    for name in ("gate_up_proj", "down_proj"):
        path = f"model.layers.1.mlp.experts.{name}"
        codes = stored[f"{path}_blocks"]
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)  # the first number lies in the lower bits
        numbers = FP4[(pairs & 7).long()] * torch.where(pairs >= 8, -1, 1)
        scaled = numbers * torch.exp2(stored[f"{path}_scales"].float() - 127).unsqueeze(-1)
        assert torch.equal(model.get_parameter(path).float(), scaled.flatten(-2).mT)


def test_fp8_is_read_as_its_definition_says(tmp_path):
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = _saved("qwen3_moe", tmp_path / "base", _fp8, fp8)
    stored = load_file(folder / "model.safetensors")
    got = metier.load(folder, dtype="float32").model.get_parameter("model.layers.1.mlp.experts.down_proj")
    for expert, weight in enumerate(got):
        path = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(weight, stored[path].float() * stored[f"{path}_scale_inv"])


def test_it_never_depends_on_the_kernels_that_are_there(checkpoint, monkeypatch):
    asked = {}
    whole = transformers.PreTrainedModel.from_pretrained.__func__

    def spy(cls, *args, **options):
        asked.update(options)
        return whole(cls, *args, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(spy))
    metier.load(checkpoint)
    assert asked["quantization_config"].dequantize


@pytest.mark.parametrize("store", ["host", "disk"])
def test_weight_by_weight_it_is_the_same_to_the_bit(checkpoint, store):
    with torch.no_grad():
        want = metier.load(checkpoint).model(_tokens()).logits
        model = load_frozen(checkpoint, store=store).model
        assert torch.equal(model(_tokens()).logits, want)
    assert frozen_weights(model)


def test_a_delta_is_trained_and_merged(checkpoint, tmp_path):
    model = peft.get_peft_model(metier.load(checkpoint, dtype="float32").model, metier.EsftConfig(experts={1: [0, 2]}))
    model(input_ids=_tokens(), labels=_tokens()).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.any() for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.sub_(parameter.grad)
        want = model.eval()(_tokens()).logits
        model.save_pretrained(tmp_path / "delta")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*is loaded as a whole, because it is quantised")
            merged = metier.merge(tmp_path / "delta", checkpoint, tmp_path / "merged", dtype="float32")
        assert "quantization_config" not in json.loads((merged / "config.json").read_text())
        assert torch.equal(metier.load(merged).model(_tokens()).logits, want)
