"""Every MoE family of the installed transformers through the whole chain; nine unlike ones in the default run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import metier
from families.chain import STEPS, made_model, random_tokens, run_chain
from families.configs import tiny_config
from families.discovery import contract_families, foreign_families, model_type
from families.fresh import FreshProcesses
from families.page import PAGE, row
from families.unsupported import UNSUPPORTED
from metier.config import RunConfig, passed_over
from metier.errors import UnsupportedModelError
from metier.memory.frozen_model import frozen_weights
from metier.memory.frozen_weight import FrozenWeight
from metier.methods.wrap import wrap
from metier.models.fingerprint import fingerprint_of_any, router_tensors
from metier.models.moe import MoELayer, moe_layers
from metier.models.unwrap import bare_model
from metier.planning.from_config import run_skeleton
from metier.planning.state import training_plan
from tiny_models import tiny_tokenizer

UNLIKE = (
    "aria",  # multimodal; transposed
    "deepseek_v4",  # a router by token id in one layer, by hidden states in the other
    "ernie4_5_vl_moe",  # multimodal; text and vision each with experts in one block
    "gpt_oss",  # biases, transposed, gate and up interleaved
    "jamba",  # attention and Mamba layers
    "llama4",  # outside the contract
    "nemotron_h",  # no gate
    "qwen3_vl_moe",  # multimodal
    "switch_transformers",  # outside the contract; an encoder-decoder
)
ALL = sorted([*contract_families(), *foreign_families()])
METHODS = ("esft", "expert_lora", "meft", "lora", "full")
NOT_FOR = {"switch_transformers": ("meft",), "nemotron_h": ("meft",)}
"""Methods of decoders, and of layers that have a feed-forward block."""
MIN_SUPPORTED = 60
"""Of the families in the contract, as the README promises."""


@pytest.fixture(scope="module")
def processes() -> Iterator[FreshProcesses]:
    with FreshProcesses() as started:
        yield started


@pytest.mark.parametrize(
    "family", [family if family in UNLIKE else pytest.param(family, marks=pytest.mark.slow) for family in ALL]
)
def test_the_chain_comes_as_far_as_the_support_page_says(
    family: str, tmp_path: Path, processes: FreshProcesses
) -> None:
    result = run_chain(family, tmp_path, processes)
    if family in UNSUPPORTED:
        step, reason = UNSUPPORTED[family]
        assert result.error is not None, f"{family} passes now: take it out of families/unsupported.py"
        assert (STEPS[result.num_passed], reason in result.reason) == (step, True), result.reason
    elif result.error is not None:
        raise AssertionError(f"{family} stopped at {STEPS[result.num_passed]!r}: {result.reason}") from result.error
    assert row(result) in _page(), "docs/support.md is out of date: run `python scripts/support_page.py`"


STORABLE = [family for family in ALL if family not in UNSUPPORTED and family not in ("llama4", "switch_transformers")]
"""Families whose weights may lie in a store; metier stacks the others' experts itself."""


@pytest.mark.parametrize(
    "family",
    [
        family if family in (*UNLIKE, "hunyuan_v1_moe") else pytest.param(family, marks=pytest.mark.slow)
        for family in STORABLE
    ],
)
def test_with_its_weights_on_disk_a_family_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    tokens = random_tokens(seed=7)
    plain = metier.load(tmp_path).model
    stored = metier.load_frozen(tmp_path, store="disk").model
    with torch.no_grad():
        want, got = (model(input_ids=tokens).logits for model in (plain, stored))
    experts = {id(weight.store) for weight in frozen_weights(stored) if len(weight.store.shape) == 3}
    assert experts, "no expert is in the store"
    assert torch.equal(got, want)
    assert fingerprint_of_any(stored) == fingerprint_of_any(plain)
    routers = [p for layer in _expert_layers(stored) for _, p in router_tensors(bare_model(stored), layer)]
    assert not any(isinstance(router, FrozenWeight) for router in routers), "a router is in the store"


def _expert_layers(model: PreTrainedModel) -> list[MoELayer]:
    try:
        return moe_layers(bare_model(model))
    except UnsupportedModelError:
        return []


PLANNABLE = [family for family in ALL if family not in UNSUPPORTED]


@pytest.mark.parametrize(
    "family", [family if family in UNLIKE else pytest.param(family, marks=pytest.mark.slow) for family in PLANNABLE]
)
def test_a_plan_from_the_configuration_is_that_of_the_built_model(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    for method in sorted(set(METHODS) - set(NOT_FOR.get(family, ()))):
        sizes = {"select_top_k": 2, "meft_r": 32}
        own = {name: value for name, value in sizes.items() if name not in passed_over(method)}
        config = RunConfig(model=str(tmp_path), dataset="d", output_dir=str(tmp_path), method=method, **own)
        skeleton = run_skeleton(config)
        built = wrap(metier.load(tmp_path).model, config, skeleton.selection)
        expected = training_plan(built, method=method, selection=skeleton.selection)
        assert skeleton.state(config) == expected, method


@pytest.mark.parametrize("family", ALL)
def test_every_family_has_a_tiny_configuration_or_a_reason(family: str) -> None:
    kind = model_type(family)
    if kind is None:
        assert family in UNSUPPORTED, f"{family} has no model for language: give the reason in families/unsupported.py"
    else:
        tiny_config(kind)  # raises where families/configs.py lacks an override


def test_at_least_sixty_families_of_the_contract_are_supported() -> None:
    assert len(contract_families().keys() - UNSUPPORTED.keys()) >= MIN_SUPPORTED


def test_no_reason_is_for_a_family_that_does_not_exist() -> None:
    assert UNSUPPORTED.keys() <= set(ALL)


def test_the_support_page_has_a_row_for_each_family_and_no_other() -> None:
    names = [line.split(" | ")[0].removeprefix("| ") for line in _page() if line.startswith("| ")]
    assert sorted(name for name in names if name not in ("family", "---")) == ALL


def save_tiny(family: str, folder: Path) -> None:
    kind = model_type(family)
    assert kind is not None
    made_model(tiny_config(kind)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _page() -> list[str]:
    return PAGE.read_text(encoding="utf-8").splitlines()
