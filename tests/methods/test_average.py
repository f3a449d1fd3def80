"""Averaging adapters, of our methods and of PEFT's; and what cannot be averaged."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from metier.errors import ConfigError
from metier.methods.average import average_adapters
from metier.methods.bottleneck import BottleneckConfig
from metier.methods.esft import EsftConfig
from metier.methods.meft import MeftConfig
from tiny_models import tiny_model

CONFIGS = {
    "bottleneck": lambda: BottleneckConfig(r=4, variant="houlsby"),
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj"]),
    "meft": lambda: MeftConfig(r=16, num_key_experts=4, num_active_key_experts=2, top_k=4),
    "esft": lambda: EsftConfig(experts={"1": [0, 2]}),
}


def soup(kind: str = "bottleneck", *, names=("one", "two", "three")):
    model = peft.get_peft_model(tiny_model("mixtral"), CONFIGS[kind](), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[kind]())
    for seed, name in enumerate(names):
        fill(model, name, seed)
    return model.eval()


def fill(model, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(model, adapter_name=name)
    floats = {k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for k, v in state.items()}
    peft.set_peft_model_state_dict(model, floats, adapter_name=name)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 0.25]])
def test_the_average_has_the_mean_of_every_parameter(kind, weights):
    model = soup(kind)
    before = model(torch.tensor([[5, 6, 7]])).logits
    average_adapters(model, ["one", "two", "three"], weights, new_name="soup")
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before), "the active adapter stays the active one"
    states = [get_peft_model_state_dict(model, adapter_name=name) for name in ("one", "two", "three")]
    got = get_peft_model_state_dict(model, adapter_name="soup")
    assert got.keys() == states[0].keys()
    for key, tensor in got.items():
        if tensor.is_floating_point():
            expected = sum(w * state[key] for w, state in zip(weights or [1 / 3] * 3, states, strict=True))
            torch.testing.assert_close(tensor, expected)
        else:
            assert torch.equal(tensor, states[0][key])


def test_an_average_of_one_is_the_adapter_itself_and_computes_as_it():
    model = soup()
    average_adapters(model, ["two"], new_name="copy")
    tokens = torch.tensor([[5, 6, 7]])
    model.set_adapter("two")
    expected = model(tokens).logits
    model.set_adapter("copy")
    assert torch.equal(model(tokens).logits, expected)
    assert model.peft_config["copy"] is not model.peft_config["two"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["one", "four"], {}, "no adapter 'four', expected some of the model's: one, two, three"),
        ([], {}, "got no names"),
        (["one", "two"], {"new_name": "three"}, "already has an adapter 'three'"),
        (["one", "two"], {"weights": [1.0]}, "got 1 weights for 2 names"),
        (["one", "two"], {"weights": [0.5, 0.6]}, r"weights must sum to 1, got \[0.5, 0.6\]: 1.1"),
    ],
)
def test_what_cannot_be_averaged_is_refused(names, options, message):
    with pytest.raises(ConfigError, match=message):
        average_adapters(soup(), names, **options)


def test_configurations_that_differ_are_refused_by_their_first_difference():
    model = soup()
    model.add_adapter("wide", BottleneckConfig(r=8, variant="houlsby", scaling=2.0))
    with pytest.raises(ConfigError, match="adapters 'one' and 'wide' differ in r: 4 and 8"):
        average_adapters(model, ["one", "wide"])
    assert "average" not in model.peft_config
