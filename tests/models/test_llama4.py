"""Llama 4 made to follow the contract: the same function, the same checkpoint, one expert a token."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from metier.errors import UnsupportedModelError
from metier.models.foreign import follow_contract
from metier.models.moe import moe_layers
from tiny_models import VOCAB_SIZE, tiny_model

# float32; transformers sums over all experts, of which all but one give zero
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def _pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    plain, changed = tiny_model("llama4_text"), tiny_model("llama4_text")
    with torch.no_grad():
        for model in (plain, changed):  # transformers makes these zero, which would hide the experts
            for name, parameter in model.named_parameters():
                if "experts" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 4)
    follow_contract(changed)
    return plain, changed


def _tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (3, 63), generator=torch.Generator().manual_seed(0))


def test_logits_and_gradients_are_those_of_transformers() -> None:
    plain, changed = _pair()
    ids = _tokens()
    out = [model(input_ids=ids, labels=ids) for model in (plain, changed)]
    torch.testing.assert_close(out[1].logits, out[0].logits, **TOLERANCE)
    for result in out:
        result.loss.backward()
    for (name, wanted), (_, got) in zip(plain.named_parameters(), changed.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


def test_the_checkpoint_stays_the_same() -> None:
    plain, changed = _pair()
    before, after = plain.state_dict(), changed.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_its_layers_are_seen_with_their_true_sizes() -> None:
    layers = moe_layers(_pair()[1])
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert (layers[0].num_experts, layers[0].top_k, layers[0].num_shared_experts) == (4, 1, 1)
    assert (layers[0].hidden_size, layers[0].moe_intermediate_size, layers[0].is_transposed) == (32, 24, True)
    assert layers[0].router_path == "model.layers.0.feed_forward.router"


def test_the_backbone_is_found_where_trainers_look_for_it() -> None:
    plain, changed = _pair()
    assert plain.base_model is plain, "transformers has mended it: drop our own"
    assert changed.base_model is changed.model


def test_router_logits_are_still_given() -> None:
    plain, changed = _pair()
    wanted, got = (model.eval()(input_ids=_tokens(), output_router_logits=True) for model in (plain, changed))
    assert len(got.router_logits) == 3
    torch.testing.assert_close(got.router_logits[2], wanted.router_logits[2], **TOLERANCE)


def test_twice_is_once_and_other_models_are_left_alone() -> None:
    _, changed = _pair()
    modules = list(changed.modules())
    follow_contract(changed)
    assert list(changed.modules()) == modules
    olmoe = tiny_model("olmoe")
    modules = list(olmoe.modules())
    follow_contract(olmoe)
    assert list(olmoe.modules()) == modules


def test_several_experts_a_token_are_refused() -> None:
    model = tiny_model("llama4_text", num_experts_per_tok=2)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.feed_forward: got top_k=2, but metier works on"):
        follow_contract(model)


def test_a_plain_llama_4_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Load it with `metier\.load`, or call"):
        moe_layers(tiny_model("llama4_text"))
