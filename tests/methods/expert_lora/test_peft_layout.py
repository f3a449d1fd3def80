"""Our LoRA on experts as PEFT's LoRA on stacked parameters, and back: plain PEFT gives the same logits."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.expert_lora.test_promises import FAMILIES, config, logits, tokens, train, trained
from metier.errors import CorruptDeltaError, DeltaError
from metier.methods.expert_lora import ExpertLoraConfig, export_peft_lora, import_peft_lora
from metier.models.moe import moe_layers
from tiny_models import tiny_model

# float32; PEFT forms the changed weights
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_gives_the_same_logits_and_the_way_back_the_same_matrices(family: str, tmp_path: Path) -> None:
    base = tiny_model(family)
    layers = moe_layers(base)
    ranks = {layers[0].index: {3: 2}} if len(layers) > 1 else None
    ours = peft.get_peft_model(base, config(base, ranks=ranks, lora_alpha=6.0))
    train(ours)
    want = logits(ours, tokens())
    export_peft_lora(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert theirs.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(theirs, tokens()), want, **TOLERANCE)
    again = import_peft_lora(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(again, tokens()), want, **TOLERANCE)
    assert again.peft_config["default"].experts == ours.peft_config["default"].experts
    for one, other in zip(moe_layers(ours), moe_layers(again), strict=True):
        for name, change in one.entry.changes("default").items():
            torch.testing.assert_close(other.entry.changes("default")[name], change, **TOLERANCE)


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_lora_that_peft_trained_is_taken_over(family: str, use_rslora: bool, tmp_path: Path) -> None:
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    options = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": names, "use_rslora": use_rslora}
    theirs = peft.get_peft_model(tiny_model(family), peft.LoraConfig(**options))
    train(theirs)
    want = logits(theirs, tokens())
    theirs.save_pretrained(tmp_path)
    ours = import_peft_lora(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(ours, tokens()), want, **TOLERANCE)
    assert ours.peft_config["default"].peft_type == "EXPERT_LORA"


def test_a_lora_on_one_of_the_two_weights_is_taken_over(tmp_path: Path) -> None:
    options = {"r": 3, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    theirs = peft.get_peft_model(tiny_model("deepseek_v2"), peft.LoraConfig(**options))
    train(theirs)
    theirs.save_pretrained(tmp_path)
    ours = import_peft_lora(tiny_model("deepseek_v2"), tmp_path)
    torch.testing.assert_close(logits(ours, tokens()), logits(theirs, tokens()), **TOLERANCE)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    plain = peft.get_peft_model(tiny_model("deepseek_v2"), peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(DeltaError, match="adapter 'default' is LoraConfig, expected ExpertLoraConfig"):
        export_peft_lora(plain, tmp_path)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(DeltaError, match="expected a LoRA with target_parameters"):
        import_peft_lora(tiny_model("deepseek_v2"), tmp_path / "plain")
    both = {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    peft.get_peft_model(tiny_model("deepseek_v2"), peft.LoraConfig(**both)).save_pretrained(tmp_path / "both")
    with pytest.raises(DeltaError, match="the LoRA has target_modules, which"):
        import_peft_lora(tiny_model("deepseek_v2"), tmp_path / "both")
    whole = peft.get_peft_model(tiny_model("deepseek_v2"), ExpertLoraConfig(experts={1: [2]}, also_train=["router"]))
    with pytest.raises(DeltaError, match=r"adapter 'default' replaces model\.layers\.1\.mlp\.gate too, which a LoRA"):
        export_peft_lora(whole, tmp_path / "whole")
    zero = peft.get_peft_model(tiny_model("deepseek_v2"), ExpertLoraConfig(experts={1: [2]}))
    export_peft_lora(zero, tmp_path / "zero")
    with pytest.raises(DeltaError, match="every change is zero"):
        import_peft_lora(tiny_model("deepseek_v2"), tmp_path / "zero")


def test_a_file_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    export_peft_lora(trained("deepseek_v2"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    wrong = [
        ({k: v for k, v in tensors.items() if k != name}, "got no such tensor"),
        ({**tensors, name: tensors[name][:3].clone()}, "got shape"),
        ({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(2)}, "belongs to no stacked expert"),
    ]
    for content, text in wrong:
        save_file(content, path)
        base = tiny_model("deepseek_v2")
        with pytest.raises(CorruptDeltaError, match=text):
            import_peft_lora(base, tmp_path)
        assert not any("lora" in key for key in base.state_dict())
