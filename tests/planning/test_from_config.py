"""Sizes from a configuration alone: those of well-known models, and of built ones to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import metier
from metier.config import RunConfig
from metier.errors import ConfigError, SelectionError
from metier.memory.frozen_model import load_frozen
from metier.methods.wrap import wrap
from metier.planning.from_config import Skeleton, run_skeleton
from metier.planning.state import training_plan
from metier.routing.selection import ExpertSelection
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

METHODS = ("esft", "expert_lora", "meft", "lora", "full")
V2_LITE = {
    "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1,
}  # fmt: skip
KNOWN = {
    "DeepSeek-V2-Lite": ("deepseek_v2", V2_LITE, 15_706_484_224),
    "DeepSeek-V3": ("deepseek_v3", {}, 671_026_404_352),
    "Mixtral-8x7B": ("mixtral", {}, 46_702_792_704),
    "OLMoE-1B-7B": (
        "olmoe",
        {
            "vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        },
        6_919_161_856,
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "tie_word_embeddings": False,
        },
        30_532_122_624,
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        },
        20_914_757_184,
    ),
}  # fmt: skip
"""Model type, public hyperparameters where the class's defaults are others, and parameters of the published model."""


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
    kind, sizes, num_parameters = KNOWN[name]
    plan = run_skeleton(run(select_top_k=1), AutoConfig.for_model(kind, **sizes)).state(run())
    assert plan.num_frozen == num_parameters
    assert plan.base_bytes == 2 * num_parameters


def test_esft_deltas_of_deepseek_v2_lite_have_the_size_of_their_experts() -> None:
    """Three and seven experts in each of 26 layers, 2 bytes a parameter; the paper's deltas have 2.57 to 3.20 GB on average."""
    base = AutoConfig.for_model("deepseek_v2", **V2_LITE)
    few, many = (run_skeleton(run(select_top_k=k), base).state(run()).num_trained * 2 / 1e9 for k in (3, 7))
    assert few == pytest.approx(3 * 26 * 3 * 2048 * 1408 * 2 / 1e9)
    assert 1.2 < few < many < 3.2


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
    base = AutoConfig.for_model("deepseek_v2", **V2_LITE)
    assumed = run_skeleton(run(top_p=0.3), base)
    assert counts(assumed) == {7}
    (said,) = assumed.assumptions
    assert said.startswith("7 experts a layer (10%): how many top_p picks depends on the task.")
    assert "select_budget_bytes" in run_skeleton(run(select_budget_bytes=10**9), base).assumptions[0]
    given = run_skeleton(run(select_top_fraction=0.25), base)
    assert (counts(given), given.assumptions) == ({16}, ())


def test_a_selection_of_the_run_is_used_and_checked(tmp_path: Path) -> None:
    base = AutoConfig.for_model("deepseek_v2", **V2_LITE)
    ExpertSelection(experts={1: (5,), 9: (1, 2, 3)}).save(tmp_path / "selection.json")
    skeleton = run_skeleton(run(selection=str(tmp_path / "selection.json")), base)
    assert skeleton.state(run()).num_trained == 4 * 3 * 2048 * 1408
    assert skeleton.assumptions == ()
    ExpertSelection(experts={1: (64,)}).save(tmp_path / "selection.json")
    with pytest.raises(SelectionError, match="64"):
        run_skeleton(run(selection=str(tmp_path / "selection.json")), base)


def test_more_experts_than_a_layer_has_are_refused() -> None:
    base = AutoConfig.for_model("deepseek_v2", **V2_LITE)
    with pytest.raises(ConfigError, match=r"select_top_k=65 is more than the 64 experts of layers\.1\. Lower it\."):
        run_skeleton(run(select_top_k=65), base)


def test_a_model_whose_weights_are_elsewhere_has_no_fingerprint() -> None:
    with torch.device("meta"):
        model = tiny_model("olmoe")
    with pytest.raises(NotImplementedError, match="meta"):
        metier.models.fingerprint.fingerprint(model)
