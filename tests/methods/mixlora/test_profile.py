"""A dense model with a mixture on it is profiled and its experts are selected as a sparse model's are."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import PreTrainedModel

import metier
from metier.data.records import Message, Record
from metier.errors import SelectionError, UnsupportedModelError
from metier.methods.mixlora import MixLoraConfig
from metier.models.fingerprint import fingerprint_of_any
from metier.models.moe import is_dense, moe_layers
from metier.models.routed import routed_layers
from metier.routing.selection import ExpertSelection
from tiny_models import tiny_model, tiny_tokenizer

RECORDS = [
    Record(
        messages=(Message(role="user", content=f"what is {n}"), Message(role="assistant", content=f"it is {n}")),
        origin=f"record {n}",
    )
    for n in range(12)
]


CONFIG = MixLoraConfig(num_experts=4, top_k=2, r=2)


def shaken(model: peft.PeftModel) -> peft.PeftModel:
    """With values of an adapter that do something, as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixlora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture
def wrapped() -> peft.PeftModel:
    return shaken(peft.get_peft_model(tiny_model("llama"), copy.copy(CONFIG)))


def profiled(model: PreTrainedModel, **options):
    return metier.profile(model, tiny_tokenizer(), RECORDS, num_tokens=256, max_length=32, **options)


@pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")
def test_a_profile_counts_what_the_routers_choose(wrapped) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    for layer in routed_layers(wrapped):
        layer.entry.register_forward_pre_hook(
            lambda _, args, index=layer.index: seen.setdefault(index, []).append(args[1])
        )
    profile = profiled(wrapped)
    assert (profile.layer_ids, profile.num_experts, profile.top_k) == ((0, 1, 2), 4, 2)
    assert profile.meta["adapter"] == "default"
    assert profile.meta["fingerprint"] == fingerprint_of_any(tiny_model("llama"))
    for position, index in enumerate(profile.layer_ids):
        counts_E = torch.cat(seen[index]).flatten().bincount(minlength=4)
        assert profile.token_counts_HLE.sum(0)[position].tolist() == counts_E.tolist()
        assert counts_E.sum() == 2 * sum(profile.num_tokens_H)


@pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")
def test_a_profile_s_selection_is_trained(wrapped) -> None:
    selection = metier.select(profiled(wrapped), metier.SelectionConfig(score="token", top_p=0.4))
    selection.validate(wrapped)
    wrapped.base_model.select_experts(selection)
    trained = {name.rpartition(".")[0] for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained == {
        f"base_model.model.model.layers.{layer}.mlp.mixlora_mixture.default.pairs.{expert}"
        for layer, ids in selection.experts.items()
        for expert in ids
    }
    again = MixLoraConfig.from_selection(selection, num_experts=4)
    assert again.experts == wrapped.peft_config["default"].experts
    wrapped.base_model.select_experts(None)
    assert all(p.requires_grad for name, p in wrapped.named_parameters() if "mixlora_" in name)


@pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")
def test_output_norms_are_those_of_what_an_expert_adds() -> None:
    model = tiny_model("llama", mlp_bias=True)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        block.down_proj.bias.normal_()
    wrapped = shaken(peft.get_peft_model(model, copy.copy(CONFIG)))
    (view, *_) = routed_layers(wrapped)
    hidden_TD, ids_T1 = torch.randn(5, 32), torch.tensor([[0], [1], [2], [3], [0]])
    half_TD = view.entry(hidden_TD, ids_T1, torch.full((5, 1), 0.5))
    whole_TD = view.entry(hidden_TD, ids_T1, torch.ones(5, 1), with_base=True)
    torch.testing.assert_close(half_TD, 0.5 * (whole_TD - block(hidden_TD)), rtol=1e-4, atol=1e-6)
    assert profiled(wrapped, output_norms=True).token_counts_HLE.sum() > 0


def test_the_views_of_a_mixture(wrapped) -> None:
    views = routed_layers(wrapped)
    assert [view.index for view in views] == [0, 1, 2]
    assert views[1].path == "model.layers.1.mlp.mixlora_mixture.default"
    assert (views[1].num_experts, views[1].top_k, views[1].hidden_size) == (4, 2, 32)
    assert views[1].moe_intermediate_size == 48
    assert routed_layers(wrapped.get_base_model())[1].entry is views[1].entry


def test_a_base_with_a_mixture_on_it_is_still_a_dense_base(wrapped) -> None:
    assert is_dense(wrapped)
    assert fingerprint_of_any(wrapped) == fingerprint_of_any(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match="It is a dense model"):
        moe_layers(wrapped)


def test_only_what_is_active_is_seen(wrapped) -> None:
    wrapped.add_adapter("second", MixLoraConfig(num_experts=6, top_k=1, r=2))
    assert {view.num_experts for view in routed_layers(wrapped)} == {4}
    wrapped.set_adapter("second")
    assert {view.num_experts for view in routed_layers(wrapped)} == {6}
    wrapped.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedModelError, match="two mixtures are active here"):
        routed_layers(wrapped)
    with wrapped.disable_adapter(), pytest.raises(UnsupportedModelError, match="It is a dense model"):
        routed_layers(wrapped)


def test_the_layers_of_a_sparse_model_are_its_own() -> None:
    model = tiny_model("mixtral")
    assert [view.path for view in routed_layers(model)] == [view.path for view in moe_layers(model)]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (ExpertSelection(experts={9: (0,)}), "has no mixture there"),
        (ExpertSelection(experts={0: (4,)}), "has num_experts=4"),
        (ExpertSelection(experts={0: (1,)}, shared_experts=True), "Set both to false"),
    ],
)
def test_a_selection_of_what_is_not_there_is_refused_and_changes_nothing(wrapped, selection, message) -> None:
    with pytest.raises(SelectionError, match=message):
        wrapped.base_model.select_experts(selection)
    assert wrapped.peft_config["default"].experts is None
