"""Sizes from a configuration alone: those of well-known models, and of built ones to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import metier
from metier.config import RunConfig, passed_over
from metier.errors import ConfigError, ModelError, SelectionError
from metier.memory.frozen_model import load_frozen
from metier.methods.wrap import wrap
from metier.planning.from_config import Skeleton, run_skeleton
from metier.planning.state import training_plan
from metier.routing.selection import ExpertSelection
from planning.known_configs import KNOWN_CONFIGS
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

METHODS = ("esft", "expert_lora", "meft", "lora", "full")
KNOWN = {
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_404_352,
    "Mixtral-8x7B": 46_702_792_704,
    "OLMoE-1B-7B": 6_919_161_856,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
}
"""Parameters of the published model."""


DENSE = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def run(**options: Any) -> RunConfig:
    return RunConfig(**{"model": "m", "dataset": "d", "output_dir": "o", "dtype": "bfloat16", **options})


@pytest.mark.parametrize("name", KNOWN)
def test_well_known_models_have_the_parameters_that_were_published(name: str) -> None:
    plan = run_skeleton(run(select_top_k=1), KNOWN_CONFIGS[name]()).state(run())
    assert plan.num_frozen == KNOWN[name]
    assert plan.base_bytes == 2 * KNOWN[name]


def built(folder: Path, config: RunConfig, selection: ExpertSelection | None):
    """The plan of the model itself, as a run makes it."""
    if config.has_frozen_base:
        loaded = load_frozen(
            folder, store=config.base_store, weight_format=config.base_format, folder=folder, dtype=config.dtype
        )
    else:
        loaded = metier.load(folder, dtype=config.dtype)
    model = wrap(loaded.model, config, selection)
    return training_plan(model, method=config.method, selection=selection, row_state_dtype=config.meft_state_dtype)


PLAIN = [(method, {}) for method in METHODS]
STORED = [(m, {"base_store": "disk"}) for m in ("esft", "expert_lora", "meft")] + [("meft", {"base_format": "int8"})]
OF_A_METHOD = [
    ("esft", {"train_attention": True, "train_router": True}),
    ("esft", {"base_format": "int8"}),
    ("full", {"dtype": "float32"}),
    ("meft", {"meft_row_dtype": "bfloat16", "meft_state_dtype": "int8", "meft_store": "disk"}),
]
CASES = [
    (family, method, options)
    for family in ("deepseek_v2", "gpt_oss", "dense")
    for method, options in (*PLAIN, *STORED, *OF_A_METHOD)
    if family != "dense" or method in ("meft", "lora", "full")
]


@pytest.mark.parametrize(("family", "method", "options"), CASES, ids=lambda value: str(value).replace("'", ""))
def test_a_plan_is_that_of_the_built_model_to_the_byte(
    family: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = LlamaForCausalLM(DENSE) if family == "dense" else tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    paths = {"model": str(tmp_path / "base"), "output_dir": str(tmp_path / "run")}
    sizes = {"select_top_k": 2, "meft_r": 64, "meft_num_active_key_experts": 4}
    sizes = {name: value for name, value in sizes.items() if name not in passed_over(method)}
    config = run(**paths, **sizes, method=method, **options)
    skeleton = run_skeleton(config)
    assert skeleton.state(config) == built(tmp_path / "base", config, skeleton.selection)
    # the one-number parameter that stands for a sparse adapter's gradients is made where they are
    assert all(p.is_meta or "meft_gradients" in name for name, p in skeleton.model.named_parameters())


def test_a_configuration_file_is_enough(tmp_path: Path) -> None:
    tiny_model("olmoe").config.save_pretrained(tmp_path)
    by_file = run_skeleton(run(model=str(tmp_path / "config.json"), select_top_k=2))
    by_folder = run_skeleton(run(model=str(tmp_path), select_top_k=2))
    assert by_file.state(run()) == by_folder.state(run())


def counts(skeleton: Skeleton) -> set[int]:
    assert skeleton.selection is not None
    return {len(ids) for ids in skeleton.selection.experts.values()}


def test_what_the_task_decides_is_assumed_and_said() -> None:
    base = KNOWN_CONFIGS["DeepSeek-V2-Lite"]()
    assumed = run_skeleton(run(top_p=0.3), base)
    assert counts(assumed) == {7}
    (said,) = assumed.assumptions
    assert said.startswith("7 experts a layer (10%): how many top_p picks depends on the task.")
    assert "select_budget_bytes" in run_skeleton(run(select_budget_bytes=10**9), base).assumptions[0]
    given = run_skeleton(run(select_top_fraction=0.25), base)
    assert (counts(given), given.assumptions) == ({16}, ())


def test_a_selection_of_the_run_is_used_and_checked(tmp_path: Path) -> None:
    base = KNOWN_CONFIGS["DeepSeek-V2-Lite"]()
    ExpertSelection(experts={1: (5,), 9: (1, 2, 3)}).save(tmp_path / "selection.json")
    skeleton = run_skeleton(run(selection=str(tmp_path / "selection.json")), base)
    assert skeleton.state(run()).num_trained == 4 * 3 * 2048 * 1408
    assert skeleton.assumptions == ()
    ExpertSelection(experts={1: (64,)}).save(tmp_path / "selection.json")
    with pytest.raises(SelectionError, match="64"):
        run_skeleton(run(selection=str(tmp_path / "selection.json")), base)


def test_more_experts_than_a_layer_has_are_refused() -> None:
    base = KNOWN_CONFIGS["DeepSeek-V2-Lite"]()
    with pytest.raises(ConfigError, match=r"select_top_k=65 is more than the 64 experts of layers\.1\. Lower it\."):
        run_skeleton(run(select_top_k=65), base)


def test_a_model_whose_weights_are_elsewhere_has_no_fingerprint() -> None:
    with torch.device("meta"):
        model = tiny_model("olmoe")
    with pytest.raises(NotImplementedError, match="meta"):
        metier.models.fingerprint.fingerprint(model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": "big"}, "the configuration could not be read"),
        ({"num_hidden_layers": [1]}, "the configuration could not be read"),
        ({"hidden_size": -8}, "no model can be made by its configuration|the configuration could not be read"),
        ({"intermediate_size": -8}, "no model can be made by its configuration"),
        ({"num_attention_heads": 0}, "no model can be made by its configuration|the configuration could not be read"),
        ({"vocab_size": None}, "no model can be made by its configuration|the configuration could not be read"),
    ],
)
def test_a_configuration_with_impossible_sizes_is_refused_by_its_file(change, told, tmp_path):
    written = json.loads(KNOWN_CONFIGS["LLaMA-7B"]().to_json_string()) | change
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = RunConfig(model=str(tmp_path), dataset="-", output_dir="-", method="full")
    with pytest.raises(ModelError, match=f"{tmp_path}.*({told})"):
        run_skeleton(config)
