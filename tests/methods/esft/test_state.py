"""Rows say which experts they are: rows of other experts are refused on every way into a model."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from metier.errors import CorruptDeltaError
from metier.methods.esft import EsftConfig
from tiny_models import VOCAB_SIZE, tiny_model

OTHERS = r"layers\.1: the delta holds rows of experts \[1, 4\], expected \[2, 3\], which adapter 'default' of this model replaces; nothing was loaded\.\nPEFT does not read"
TENSORS_FILE = "adapter_model.safetensors"
IDS = "base_model.model.model.layers.1.mlp.experts.esft_expert_ids"


def adapter(experts: dict[int, list[int]], *, step: float = 0.0) -> peft.PeftModel:
    wrapped = peft.get_peft_model(tiny_model("deepseek_v2"), EsftConfig(experts=experts))
    with torch.no_grad():
        for parameter in rows(wrapped).values():
            parameter.add_(step)
    return wrapped


def rows(model: peft.PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "esft_" in n and n.endswith(f".{adapter_name}")}


def copied(model: peft.PeftModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in rows(model).items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A folder with rows of experts 1 and 4, of the shapes of any two experts'."""
    adapter({1: [1, 4]}, step=1.0).save_pretrained(tmp_path / "others")
    return tmp_path / "others"


def test_load_adapter_over_an_adapter_of_other_experts_is_refused(others: Path) -> None:
    model = adapter({1: [2, 3]})
    before = copied(model)
    with pytest.raises(CorruptDeltaError, match=OTHERS):
        model.load_adapter(others, "default")
    assert_same(rows(model), before)


def test_load_adapter_over_an_adapter_of_the_same_experts_loads(others: Path) -> None:
    model = adapter({1: [1, 4]})
    result = model.load_adapter(others, "default")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(rows(model), rows(adapter({1: [1, 4]}, step=1.0)))


def test_the_layer_that_differs_is_found_behind_one_that_does_not(tmp_path: Path) -> None:
    adapter({1: [2, 3], 2: [0]}, step=1.0).save_pretrained(tmp_path)
    model = adapter({1: [2, 3], 2: [5]})
    before = copied(model)
    with pytest.raises(CorruptDeltaError, match=r"layers\.2: the delta holds rows of experts \[0\], expected \[5\]"):
        model.load_adapter(tmp_path, "default")
    assert_same(rows(model), before)


def test_set_peft_model_state_dict_refuses_rows_of_other_experts(others: Path) -> None:
    model = adapter({1: [2, 3]})
    with pytest.raises(CorruptDeltaError, match=OTHERS):
        set_peft_model_state_dict(model, load_file(others / TENSORS_FILE))
    with pytest.raises(CorruptDeltaError, match=OTHERS):
        set_peft_model_state_dict(model, get_peft_model_state_dict(adapter({1: [1, 4]})), ignore_mismatched_sizes=True)


def test_from_pretrained_refuses_a_configuration_of_other_experts(others: Path) -> None:
    path = others / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "experts": {"1": [2, 3]}}))
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(CorruptDeltaError, match=OTHERS):
            peft.PeftModel.from_pretrained(tiny_model("deepseek_v2"), others, low_cpu_mem_usage=low_cpu_mem_usage)


def test_resuming_transformers_trainer_refuses_rows_of_other_experts(tmp_path: Path) -> None:
    def trainer(experts: list[int], max_steps: int) -> transformers.Trainer:
        ids = torch.randint(3, VOCAB_SIZE, (4, 8), generator=torch.Generator().manual_seed(0))
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=max_steps, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        return transformers.Trainer(model=adapter({1: experts}), args=arguments, train_dataset=data)

    trainer([1, 4], 1).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert load_file(checkpoint / TENSORS_FILE)[IDS].tolist() == [1, 4]
    with pytest.raises(CorruptDeltaError, match=OTHERS):
        trainer([2, 3], 2).train(resume_from_checkpoint=str(checkpoint))
    assert trainer([1, 4], 2).train(resume_from_checkpoint=str(checkpoint)).global_step == 2


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (None, r"esft_expert_ids\.default: the delta holds no such tensor, expected shape \(2,\)"),
        (torch.tensor([1]), r"esft_expert_ids\.default: the delta holds shape \(1,\), expected shape \(2,\)"),
        (torch.tensor([4, 1]), r"rows of experts \[4, 1\], expected \[1, 4\]"),
        (torch.tensor([1.0, 4.0]), r"rows of experts \[1\.0, 4\.0\] as torch\.float32, expected \[1, 4\]"),
    ],
)
def test_rows_that_do_not_say_it_or_say_it_otherwise_are_refused(ids: Tensor | None, match: str, others: Path) -> None:
    tensors = load_file(others / TENSORS_FILE)
    del tensors[IDS]
    if ids is not None:
        tensors[IDS] = ids
    save_file(tensors, others / TENSORS_FILE)
    with pytest.raises(CorruptDeltaError, match=match):
        peft.PeftModel.from_pretrained(tiny_model("deepseek_v2"), others)


def test_ids_of_a_layer_that_the_adapter_does_not_touch_are_foreign(others: Path) -> None:
    tensors = load_file(others / TENSORS_FILE)
    tensors[IDS.replace("layers.1", "layers.2")] = torch.tensor([0])
    save_file(tensors, others / TENSORS_FILE)
    with pytest.raises(CorruptDeltaError, match=r"layers\.2.*esft_expert_ids.*holds shape \(1,\), expected no such"):
        peft.PeftModel.from_pretrained(tiny_model("deepseek_v2"), others)


def test_each_of_several_adapters_is_saved_with_its_own_ids_and_loads_alone(tmp_path: Path) -> None:
    model = adapter({1: [1, 4]}, step=1.0)
    model.add_adapter("second", EsftConfig(experts={1: [2, 3], 2: [7]}))
    model.save_pretrained(tmp_path)
    first, second = (load_file(tmp_path / sub / TENSORS_FILE) for sub in ("", "second"))
    assert {n: t.tolist() for n, t in first.items() if "ids" in n} == {IDS: [1, 4]}
    assert {n: t.tolist() for n, t in second.items() if "ids" in n} == {
        IDS: [2, 3],
        IDS.replace("layers.1", "layers.2"): [7],
    }
    state = get_peft_model_state_dict(adapter({1: [1, 4], 2: [7]}))
    with pytest.raises(CorruptDeltaError, match=r"expected \[2, 3\], which adapter 'second'"):
        set_peft_model_state_dict(model, state, adapter_name="second")
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "default")
    assert_same(rows(model), rows(adapter({1: [1, 4]}, step=1.0)))
    assert model.base_model.model.model.layers[1].mlp.experts.expert_ids("default") == [1, 4]


def test_a_deleted_adapter_makes_room_for_one_of_other_experts(others: Path) -> None:
    model = adapter({1: [2, 3], 2: [0]})
    model.add_adapter("second", EsftConfig(experts={1: [0]}))
    model.delete_adapter("default")
    model.load_adapter(others, "default")
    assert_same(rows(model), rows(adapter({1: [1, 4]}, step=1.0)))


def test_low_cpu_mem_usage_loads_the_same_rows_and_keeps_the_ids(others: Path) -> None:
    model = peft.PeftModel.from_pretrained(tiny_model("deepseek_v2"), others, low_cpu_mem_usage=True)
    assert_same(rows(model), rows(adapter({1: [1, 4]}, step=1.0)))
    ids = model.base_model.model.model.layers[1].mlp.experts.esft_expert_ids["default"]
    assert (ids.tolist(), ids.dtype, ids.device.type) == ([1, 4], torch.int64, "cpu")


def test_a_model_cast_to_half_still_knows_and_saves_its_ids() -> None:
    model = adapter({1: [1, 4]}).half()
    state = get_peft_model_state_dict(model)
    assert (state[IDS].tolist(), state[IDS].dtype) == ([1, 4], torch.int64)
    set_peft_model_state_dict(model, state)


def test_a_models_own_state_dict_has_parameters_only() -> None:
    """accelerate's FSDP2 loading asks every entry for its device mesh, which a buffer does not have."""
    model = adapter({1: [1, 4]})
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_a_state_dict_that_is_given_is_saved_with_the_ids() -> None:
    """As transformers' Trainer saves."""
    model = adapter({1: [1, 4]})
    assert get_peft_model_state_dict(model, state_dict=model.state_dict())[IDS].tolist() == [1, 4]
    assert get_peft_model_state_dict(model, state_dict={}) == {}


def test_a_tuner_put_into_the_model_itself_checks_too(others: Path) -> None:
    config = EsftConfig(experts={1: [2, 3]})
    model = peft.inject_adapter_in_model(config, tiny_model("deepseek_v2"))
    model.peft_config = {"default": config}
    with pytest.raises(CorruptDeltaError, match=OTHERS):
        set_peft_model_state_dict(model, load_file(others / TENSORS_FILE))
    own = {name.removeprefix("base_model.model."): t for name, t in load_file(others / TENSORS_FILE).items()}
    own[IDS.removeprefix("base_model.model.")] = torch.tensor([2, 3])
    set_peft_model_state_dict(model, own)
    assert torch.equal(
        model.model.layers[1].mlp.experts.esft_down_proj["default"],
        own["model.layers.1.mlp.experts.esft_down_proj"],
    )
