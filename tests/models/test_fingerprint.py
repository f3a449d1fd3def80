"""The fingerprint: the same base is the same base however it is loaded or wrapped, another one is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, OlmoConfig, PreTrainedModel

from metier.errors import UnsupportedModelError
from metier.models.fingerprint import fingerprint, fingerprint_of_any
from tiny_models import tiny_model


def _router(model: PreTrainedModel) -> torch.nn.Parameter:
    return model.model.layers[-1].mlp.gate.weight


def test_it_is_64_hexadecimal_digits_and_repeatable() -> None:
    first = fingerprint(tiny_model("olmoe"))
    assert len(first) == 64
    assert int(first, 16) >= 0
    assert fingerprint(tiny_model("olmoe")) == first


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_one_checkpoint_has_one_fingerprint_in_either_precision(tmp_path: Path, stored: torch.dtype) -> None:
    tiny_model("deepseek_v2").to(stored).save_pretrained(tmp_path)
    prints = {
        fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert len(prints) == 1


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"]},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.gate.weight"]},
    ],
)
def test_a_peft_wrapper_does_not_change_it(targets: dict[str, list[str]]) -> None:
    model = tiny_model("olmoe")
    bare = fingerprint(model)
    assert fingerprint(get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **targets))) == bare


def _one_router_weight(model: PreTrainedModel) -> None:
    _router(model)[3, 5] += 0.01


def _two_router_rows(model: PreTrainedModel) -> None:
    _router(model)[[0, 1]] = _router(model)[[1, 0]]


@pytest.mark.parametrize("change", [_one_router_weight, _two_router_rows])
def test_a_changed_router_changes_it(change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny_model("olmoe")
    before = fingerprint(model)
    with torch.no_grad():
        change(model)
    assert fingerprint(model) != before


def test_a_correction_bias_beside_the_router_counts() -> None:
    model = tiny_model("nemotron_h")
    before = fingerprint(model)
    model.model.layers[1].mixer.gate.e_score_correction_bias[2] = 1.0
    assert fingerprint(model) != before


@pytest.mark.parametrize("change", [{"vocab_size": 263}, {"num_experts_per_tok": 3}, {"intermediate_size": 32}])
def test_another_architecture_has_another_one(change: dict[str, int]) -> None:
    model, other = tiny_model("olmoe"), tiny_model("olmoe", **change)
    with torch.no_grad():
        for mine, theirs in zip(other.model.layers, model.model.layers, strict=True):
            mine.mlp.gate.weight.copy_(theirs.mlp.gate.weight)
    assert fingerprint(other) != fingerprint(model)


def test_what_is_not_covered_does_not_change_it() -> None:
    model = tiny_model("olmoe")
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.add_(1)
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    assert fingerprint(model) == before


def test_where_no_norm_has_weights_the_embeddings_count() -> None:
    config = OlmoConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    first, second = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    assert not any(parameter.dim() == 1 for parameter in first.parameters())
    assert fingerprint_of_any(first) != fingerprint_of_any(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint_of_any(first) == fingerprint_of_any(second)


def test_a_dense_model_has_none() -> None:
    with pytest.raises(UnsupportedModelError, match="no MoE layer"):
        fingerprint(tiny_model("llama"))
