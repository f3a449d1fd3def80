"""Which modules follow the contract: with its flags, without them where nothing else is lacking, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMultimodalLM

from families.configs import tiny_config
from metier.models.contract import FLAGS, contract_flags
from metier.models.moe import moe_layers
from tiny_models import tiny_model

PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


class _HiddenGate(nn.Module):
    """The contract's call and stacks, but no flags; what lies between the products is not to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 4))
        self.down_proj = nn.Parameter(torch.zeros(3, 4, 4))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError


class _Bare(_HiddenGate):
    """All but the flags."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        raise NotImplementedError


class _CalledOtherwise(_Bare):
    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        raise NotImplementedError


def test_experts_of_the_contract_say_their_layout() -> None:
    experts = moe_layers(tiny_model("gpt_oss"))[0].experts
    assert contract_flags(experts) == PLAIN | {"has_bias": True, "is_transposed": True, "is_concatenated": False}


def test_a_layout_that_no_language_model_has_is_seen_too() -> None:
    layers = moe_layers(AutoModel.from_config(tiny_config("openai_privacy_filter")))
    assert {flag: getattr(layers[0], flag) for flag in FLAGS} == PLAIN | {"has_bias": True, "is_transposed": True}
    assert (layers[0].hidden_size, layers[0].moe_intermediate_size, layers[0].top_k) == (32, 32, 2)


def test_experts_that_lack_nothing_but_the_flags_have_the_plain_layout() -> None:
    assert contract_flags(_Bare()) == PLAIN


def test_step_3_7_is_seen_though_it_bears_no_flags() -> None:
    (layer,) = moe_layers(AutoModelForMultimodalLM.from_config(tiny_config("step3p7")))
    assert type(layer.experts).__name__ == "Step3p7Experts"
    assert (layer.index, layer.num_experts, layer.top_k, layer.num_shared_experts) == (1, 6, 2, 1)


def test_a_bias_without_flags_is_not_the_plain_layout() -> None:
    experts = _Bare()
    experts.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 8))
    assert contract_flags(experts) is None


@pytest.mark.parametrize("kind", [_CalledOtherwise, _HiddenGate])
def test_other_calls_and_hidden_gates_are_not_the_contract(kind: type[nn.Module]) -> None:
    assert contract_flags(kind()) is None


def test_a_router_is_not_experts() -> None:
    model = tiny_model("olmoe")
    assert "num_experts" in vars(model.model.layers[0].mlp.gate)
    assert contract_flags(model.model.layers[0].mlp.gate) is None
