"""Multimodal models: loaded for text, and only the experts that text passes are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForMultimodalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from families.configs import tiny_config
from metier.errors import UnsupportedModelError
from metier.models.load import load
from metier.models.moe import moe_layers
from tiny_models import tiny_model, tiny_tokenizer


def _multimodal(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForMultimodalLM.from_config(tiny_config(model_type))


def test_experts_for_images_beside_those_for_text_are_not_seen() -> None:
    model = _multimodal("ernie4_5_vl_moe")
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    block = "model.language_model.layers.1.mlp"
    assert experts == [f"{block}.text_moe.experts", f"{block}.vision_moe.experts"]
    (layer,) = moe_layers(model)
    assert layer.path == f"{block}.text_moe.experts"
    assert (layer.index, layer.router_path, layer.num_shared_experts) == (1, f"{block}.text_moe.gate", 2)


def test_a_vision_tower_with_experts_of_its_own_does_not_make_two_stacks() -> None:
    model = _multimodal("dots3_note")
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    assert len([name for name in experts if "vision_tower" in name]) == 1
    assert [layer.path for layer in moe_layers(model)] == ["model.language_model.layers.1.mlp.experts"]


class _Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


@pytest.mark.parametrize("tower", ["vision_tower", "visual", "audio_tower", "talker", "vision_model"])
def test_foreign_experts_that_no_text_passes_do_not_make_a_model_unsupported(tower: str) -> None:
    model = nn.Module()
    model.text = tiny_model("olmoe").model
    setattr(model, tower, _Foreign())
    assert [layer.path for layer in moe_layers(model)] == [f"text.layers.{i}.mlp.experts" for i in range(3)]
    model.envisioned = _Foreign()  # only contains such a word
    with pytest.raises(UnsupportedModelError, match=r"envisioned\.experts: ModuleList"):
        moe_layers(model)


def test_a_family_without_a_text_only_class_is_loaded_whole(tmp_path: Path) -> None:
    model = _multimodal("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu").model
    assert type(loaded) is type(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_another_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    AutoModelForSeq2SeqLM.from_config(tiny_config("nllb-moe")).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError,
        match=r"got an encoder-decoder \(NllbMoeForConditionalGeneration.*\n.*switch_transformers",
    ):
        load(tmp_path)
