"""Norms of the experts' weighted outputs, against one expert and one token at a time."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from metier.models.moe import MoELayer, moe_layers
from metier.routing.output_norms import output_norms_TK
from tiny_models import tiny_model

# float32, summed in another order by a product of other sizes
TOLERANCE = 1e-4
FAMILIES = ["deepseek_v2", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "nemotron_h"]


def first_layer(model: nn.Module) -> MoELayer:
    layer = moe_layers(model)[0]
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_(std=0.3)  # random biases too, which start at 0
    return layer


def inputs(layer: MoELayer, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, layer.hidden_size, generator=generator)
    ids_TK = torch.rand(num_tokens, layer.num_experts, generator=generator).argsort(dim=1)[:, : layer.top_k]
    weights_TK = torch.rand(num_tokens, layer.top_k, generator=generator)
    return hidden_TD, ids_TK, weights_TK


def one_by_one(layer: MoELayer, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Each expert's own formula, from its own matrices, for one token at a time."""
    names = layer.parameter_names()
    up, down = (getattr(layer.experts, name) for name in (n for n in names if not n.endswith("bias")))
    up_bias, down_bias = (getattr(layer.experts, n) for n in names if n.endswith("bias")) if layer.has_bias else (0, 0)
    norms_TK = torch.zeros(ids_TK.shape)
    for token, experts in enumerate(ids_TK.tolist()):
        for slot, expert in enumerate(experts):
            W_up, W_down = (W[expert].T if layer.is_transposed else W[expert] for W in (up, down))
            inner = W_up @ hidden_TD[token] + (up_bias[expert] if layer.has_bias else 0)
            inner = layer.experts._apply_gate(inner[None])[0] if layer.has_gate else layer.experts.act_fn(inner)
            output = W_down @ inner + (down_bias[expert] if layer.has_bias else 0)
            norms_TK[token, slot] = weights_TK[token, slot] * output.norm()
    return norms_TK


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_tokens", [1, 63])
@torch.no_grad()
def test_norms_are_those_of_each_expert_alone(family: str, num_tokens: int) -> None:
    layer = first_layer(tiny_model(family))
    hidden_TD, ids_TK, weights_TK = inputs(layer, num_tokens)
    norms_TK = output_norms_TK(layer.entry, hidden_TD, ids_TK, weights_TK, num_experts=layer.num_experts)
    assert norms_TK.dtype == torch.float32
    expected_TK = one_by_one(layer, hidden_TD, ids_TK, weights_TK)
    assert (expected_TK > 0).all()
    torch.testing.assert_close(norms_TK, expected_TK, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_slots_that_reached_no_expert_are_zero() -> None:
    layer = first_layer(tiny_model("olmoe"))
    hidden_TD, ids_TK, weights_TK = inputs(layer, 6)
    whole_TK = output_norms_TK(layer.entry, hidden_TD, ids_TK, weights_TK, num_experts=8)
    lost_TK = torch.zeros(ids_TK.shape, dtype=torch.bool)
    lost_TK[2:4, 0] = True
    lost_TK[:, 1] = True  # a slot that no token uses
    norms_TK = output_norms_TK(
        layer.entry, hidden_TD, ids_TK.masked_fill(lost_TK, 8), weights_TK, num_experts=layer.num_experts
    )
    torch.testing.assert_close(norms_TK, whole_TK.masked_fill(lost_TK, 0), rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_experts_are_not_called_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = first_layer(tiny_model("olmoe"))
    hidden_TD, ids_TK, weights_TK = inputs(layer, 6)
    ids_TK[:, 1] = 8
    num_tokens, forward = [], layer.entry.forward
    monkeypatch.setattr(layer.entry, "forward", lambda *args: num_tokens.append(len(args[0])) or forward(*args))
    output_norms_TK(layer.entry, hidden_TD, ids_TK, weights_TK, num_experts=8)
    assert num_tokens == [6, 6, 6]  # of four slots


@torch.no_grad()
def test_an_adapter_on_the_experts_counts() -> None:
    model = tiny_model("olmoe")
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    )
    layer = moe_layers(wrapped)[0]
    hidden_TD, ids_TK, weights_TK = inputs(layer, 5)
    before_TK = output_norms_TK(layer.entry, hidden_TD, ids_TK, weights_TK, num_experts=8)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    after_TK = output_norms_TK(layer.entry, hidden_TD, ids_TK, weights_TK, num_experts=8)
    assert (after_TK > before_TK * 1.01).any()


@torch.no_grad()
def test_hooks_on_the_entry_do_not_see_it() -> None:
    layer = first_layer(tiny_model("olmoe"))
    seen: list[object] = []
    layer.entry.register_forward_pre_hook(lambda module, args: seen.append(args))
    output_norms_TK(layer.entry, *inputs(layer, 3), num_experts=8)
    assert not seen
