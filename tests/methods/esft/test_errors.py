"""What ESFT refuses, and how it says so."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.errors import BaseMismatchError, CorruptDeltaError, DeltaError, SelectionError, UnsupportedModelError
from metier.methods.esft import EsftConfig, EsftExperts
from metier.routing.selection import ExpertSelection
from tiny_models import tiny_model


def wrapped(experts: dict[int, list[int]], family: str = "deepseek_v2") -> peft.PeftModel:
    return peft.get_peft_model(tiny_model(family), EsftConfig(experts=experts))


@pytest.mark.parametrize("experts", [None, {}, {1: []}])
def test_a_configuration_without_experts_is_refused(experts: object) -> None:
    with pytest.raises(SelectionError, match="expected a mapping of decoder layers to expert ids"):
        EsftConfig(experts=experts)


def test_an_expert_named_twice_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"layers\.1: EsftConfig names an expert twice: \[3, 3\]"):
        EsftConfig(experts={1: [3, 3]})


def test_expert_ids_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SelectionError, match="layer 'x' names"):
        EsftConfig(experts={"x": [1]})


def test_from_selection_takes_its_experts() -> None:
    chosen = ExpertSelection(experts={2: (4, 1)})
    assert EsftConfig.from_selection(chosen).experts == {2: [1, 4]}


def test_an_expert_that_does_not_exist_is_refused_before_the_model_is_touched() -> None:
    model = tiny_model("deepseek_v2")
    with pytest.raises(SelectionError, match=r"layers\.1: the adapter trains expert 71, but base .* has num_experts=8"):
        peft.get_peft_model(model, EsftConfig(experts={1: [71]}))
    assert not [m for m in model.modules() if isinstance(m, EsftExperts)]


def test_a_layer_without_experts_is_refused() -> None:
    with pytest.raises(SelectionError, match=re.escape("has no MoE layer there; its MoE layers are [1, 2]")):
        wrapped({0: [1]})


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        wrapped({0: [1]}, family="llama")


def test_another_base_is_refused_and_both_are_named(tmp_path: Path) -> None:
    tiny_model("deepseek_v2").save_pretrained(tmp_path / "base")
    base = tiny_model("deepseek_v2").from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, EsftConfig(experts={1: [1]})).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        BaseMismatchError, match=r"trained on '.*/base' with fingerprint \w{12}, but is put on 'Deepseek"
    ):
        peft.PeftModel.from_pretrained(tiny_model("deepseek_v2", seed=1), tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["missing", "foreign", "shape"])
def test_a_delta_with_other_tensors_than_its_configuration_says_is_refused(damage: str, tmp_path: Path) -> None:
    wrapped({1: [1, 2], 2: [0]}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if damage == "missing":
        del tensors[name]
    elif damage == "foreign":
        tensors[name.replace("layers.1", "layers.9")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CorruptDeltaError, match="expected"):
        peft.PeftModel.from_pretrained(tiny_model("deepseek_v2"), tmp_path)


def test_two_active_adapters_that_replace_the_same_expert_are_refused() -> None:
    model = wrapped({1: [1, 2]})
    model.add_adapter("second", EsftConfig(experts={1: [2, 3]}))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(DeltaError, match=r"layers\.1: adapters 'default' and 'second' both replace expert 2"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_mixing_an_adapter_that_is_not_loaded_is_refused() -> None:
    model = wrapped({1: [1, 2]}).eval()
    with pytest.raises(DeltaError, match=r"adapter_names names \['law'\], but the model has \['default'\]"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64), adapter_names=["law"])


def test_mixing_adapters_in_training_is_refused() -> None:
    model = wrapped({1: [1, 2]}).train()
    with pytest.raises(DeltaError, match="for inference only"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64), adapter_names=["default"])


def test_a_safe_merge_refuses_values_that_are_not_finite() -> None:
    model = wrapped({1: [1]})
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.experts.esft_down_proj["default"][0, 0, 0] = float("nan")
    with pytest.raises(DeltaError, match="not finite; nothing was merged"):
        model.merge_and_unload(safe_merge=True)


def test_a_merge_that_cannot_be_done_in_one_layer_is_done_in_none() -> None:
    model = wrapped({1: [1], 2: [0]})
    layers = model.base_model.model.model.layers
    before = layers[1].mlp.experts.base_layer.down_proj.clone()
    with torch.no_grad():
        layers[1].mlp.experts.esft_down_proj["default"].add_(1)
        layers[2].mlp.experts.esft_down_proj["default"][0, 0, 0] = float("inf")
    with pytest.raises(DeltaError, match="nothing was merged"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers[1].mlp.experts.base_layer.down_proj, before)


def test_merging_an_adapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeltaError, match=r"adapter_names names \['typo'\]"):
        wrapped({1: [1]}).merge_and_unload(adapter_names=["typo"])


def test_mixing_needs_one_name_a_row_and_nothing_merged() -> None:
    model = wrapped({1: [1, 2]}).eval()
    ids = torch.ones(4, 3, dtype=torch.int64)
    with pytest.raises(DeltaError, match="2 names for a batch of 4 rows"):
        model(input_ids=ids, adapter_names=["default", "__base__"])
    model.merge_adapter()
    with pytest.raises(DeltaError, match=r"\['default'\] are merged into the base"):
        model(input_ids=ids, adapter_names=["default"] * 4)
