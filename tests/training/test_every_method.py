"""Every method of the catalogue, as a user runs it: two steps on a tiny dense and a tiny MoE model, saved, loaded."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from metier.catalogue.method import DENSE, MOE
from metier.catalogue.tree import METHODS
from metier.config import RunConfig
from metier.config_reading import load_run_config
from metier.errors import UnsupportedModelError
from metier.memory.frozen_model import load_frozen
from metier.methods.single_task import with_one_task
from metier.methods.wrap import wrap
from metier.training import run as run_module
from metier.training.run import RunResult, train
from tiny_models import tiny_model, tiny_tokenizer

FAMILIES = {DENSE: "llama", MOE: "deepseek_v2", "mixtral": "mixtral"}
OPTIONS: dict[str, dict] = {
    "cpt": {"cpt_token_ids": [5, 6, 7, 8]},
    "trainable_tokens": {"token_indices": [70, 80]},
    # the tiny models' matrices are smaller than what PEFT takes of each by default
    "shira": {"r": 4},
    "ladder": {"reduction": 2, "num_heads": 2},
}
NOT_ON_LATENTS = ("prefix", "cartridge")
"""They stand in a KV cache of keys and values, and the MoE model's has latent vectors."""
SAME = 1e-6
"""Adapters are stored in float32: what differs is the order of sums."""
MERGED = 1e-4
"""Of logits of about 1: a merged matrix is rounded once, its two parts are not."""


def ids() -> Tensor:
    # with the tokens whose embeddings trainable_tokens trains
    return torch.cat(
        [torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0)), torch.tensor([[70, 80]] * 2)], 1
    )


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    return out[:, -ids().shape[1] :]


@pytest.fixture
def run(tmp_path: Path, records: Path, console, monkeypatch):
    """Trains a method on a tiny model of a kind; what it would take is foreseen elsewhere."""
    monkeypatch.setattr(run_module.Foresight, "before_loading", lambda self: None)
    monkeypatch.setattr(run_module.Foresight, "before_training", lambda self, *_, **__: {"not_traced": "left out"})

    def trained(name: str, kind: str, **changes):
        base = tmp_path / kind
        tiny_model(FAMILIES[kind]).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        options = {**OPTIONS.get(name, {}), **changes.pop("method_options", {})}
        values = {"learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "max_length": 128, **changes}
        if METHODS[name].selects_experts:
            values["top_p"] = 0.5
        config = RunConfig(
            model=str(base),
            dataset=str(records),
            output_dir=str(tmp_path / name),
            method=name,
            method_options=options,
            **values,
        )
        return base, train(config, console=console)

    return trained


def base_of(base: Path, name: str) -> PreTrainedModel:
    """The base as the method has it."""
    if METHODS[name].base_format is None:
        return AutoModelForCausalLM.from_pretrained(base)
    return load_frozen(base, weight_format=METHODS[name].base_format).model


def as_it_began(base: Path, result: RunResult) -> torch.nn.Module:
    """The run's model before its first step: for some methods a new adapter already changes the logits."""
    config = load_run_config(result.folder / "run.yaml")
    model = base_of(base, config.method)
    # a sparse delta of data begins as the base does, and needs the data to be made again
    if "mask_records" in METHODS[config.method].procedure_options:
        return model
    set_seed(config.seed)
    return wrap(model, config, result.selection)


CASES = [
    (method.name, kind)
    for method in METHODS.values()
    for kind in method.fits
    if kind != MOE or method.name not in NOT_ON_LATENTS
]
CASES += [(name, "mixtral") for name in NOT_ON_LATENTS]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_a_method_trains_saves_and_loads_to_the_same_logits(name: str, kind: str, run) -> None:
    if name == "adamss":
        pytest.importorskip("sklearn")  # every start of transformers takes seconds longer where it is installed
    base, result = run(name, kind)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    expected, method = logits(result.model), METHODS[name]
    assert (expected - logits(as_it_began(base, result))).abs().max() > SAME, "nothing was learnt"
    if method.saves_whole_model:
        loaded = AutoModelForCausalLM.from_pretrained(result.folder / "adapter")
    else:
        loaded = with_one_task(peft.PeftModel.from_pretrained(base_of(base, name), result.folder / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, rtol=SAME, atol=SAME)
    if method.merges and not method.saves_whole_model:
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=MERGED, atol=MERGED)


@pytest.mark.parametrize("name", NOT_ON_LATENTS)
def test_a_cache_of_keys_and_values_does_not_fit_latent_attention(name: str, run) -> None:
    with pytest.raises(UnsupportedModelError, match="its KV cache holds latent vectors"):
        run(name, MOE)


def test_a_method_for_another_kind_of_model_says_so(run) -> None:
    with pytest.raises(
        UnsupportedModelError, match="adaption_prompt: DeepseekV2ForCausalLM is a Mixture-of-Experts model"
    ):
        run("adaption_prompt", MOE)
