"""Switch Transformers made to follow the contract: the same function, the same checkpoint, tunable through PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from families.configs import tiny_config
from metier.errors import UnsupportedModelError
from metier.methods.esft import EsftConfig
from metier.models.foreign import follow_contract
from metier.models.moe import moe_layers
from tiny_models import VOCAB_SIZE

# float32; the same products, in another order
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def _plain(*, expert_capacity: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config("switch_transformers")
    config.expert_capacity = expert_capacity
    config.dropout_rate = config.router_jitter_noise = 0.0  # else training is random
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.3)
    return model


def _followed(plain: PreTrainedModel) -> PreTrainedModel:
    changed: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(plain.config)
    changed.load_state_dict(plain.state_dict())
    follow_contract(changed)
    return changed


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE, (3, 41), generator=generator)
    return {"input_ids": ids, "labels": ids.flip(1)[:, :17].contiguous()}


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**_batch()).logits
    return logits


@pytest.mark.parametrize("expert_capacity", [64, 3])
def test_logits_and_gradients_are_those_of_transformers_with_full_experts_too(expert_capacity: int) -> None:
    plain = _plain(expert_capacity=expert_capacity)
    changed = _followed(plain)
    if expert_capacity == 3:
        assert (_logits(plain) - _logits(_plain())).abs().max() > 1e-3, "no expert is full: this proves nothing"
    out = [model(**_batch()) for model in (plain, changed)]
    torch.testing.assert_close(out[1].logits, out[0].logits, **TOLERANCE)
    for result in out:
        result.loss.backward()
    stacked = dict(changed.named_parameters())
    for name, parameter in plain.named_parameters():
        start, is_expert, end = name.partition(".experts.expert_")
        if is_expert:
            index, _, old_name = end.partition(".")
            stack = stacked[f"{start}.experts.{'up_proj' if old_name == 'wi.weight' else 'down_proj'}"]
            # an expert without a token has no gradient in transformers, and one of zero here
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(stack.grad[int(index)], wanted, **TOLERANCE)
        else:
            torch.testing.assert_close(stacked[name].grad, parameter.grad, **TOLERANCE)


def test_layers_of_encoder_and_decoder_count_in_one_row() -> None:
    layers = moe_layers(_followed(_plain()))
    assert [layer.path for layer in layers] == [
        f"{stack}.block.1.layer.{sublayer}.mlp.experts" for stack, sublayer in (("encoder", 1), ("decoder", 2))
    ]
    assert [layer.index for layer in layers] == [1, 3]
    assert (layers[0].num_experts, layers[0].top_k, layers[0].has_gate) == (6, 1, False)
    assert (layers[0].hidden_size, layers[0].moe_intermediate_size) == (32, 32)
    assert layers[1].router_path == "decoder.block.1.layer.2.mlp.router"


def test_the_state_dict_is_that_of_transformers_and_can_be_loaded_back() -> None:
    plain = _plain()
    changed = _followed(plain)
    before, after = plain.state_dict(), changed.state_dict()
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    changed.load_state_dict({name: tensor.clone() for name, tensor in before.items()})
    torch.testing.assert_close(_logits(changed), _logits(plain), **TOLERANCE)


def test_a_tuned_model_is_saved_as_transformers_reads_it(tmp_path: Path) -> None:
    model = _followed(_plain())
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, EsftConfig(experts={1: [0, 4], 3: [2]}))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        wrapped(**_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = _logits(wrapped)
    with wrapped.disable_adapter():
        assert (want - _logits(wrapped)).abs().max() > 1e-3, "the delta does nothing: this proves nothing"
    wrapped.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(_logits(loaded), want, **TOLERANCE)
    moved = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, base[name])}
    rows = [("encoder.block.1.layer.1", 0), ("encoder.block.1.layer.1", 4), ("decoder.block.1.layer.2", 2)]
    assert moved == {f"{path}.mlp.experts.expert_{i}.{w}.weight" for path, i in rows for w in ("wi", "wo")}


def test_a_plain_one_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"SwitchTransformersExperts is an MoE .*\n.*foreign\.follow_contract"
    ):
        moe_layers(_plain())
