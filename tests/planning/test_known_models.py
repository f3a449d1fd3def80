"""Sizes of well-known models and of what is trained on them, against the figures that were published."""

from __future__ import annotations

from typing import Any

import pytest

from metier.config import RunConfig
from metier.planning.estimate import Estimator
from metier.planning.from_config import run_skeleton
from metier.planning.state import TrainingPlan
from planning.known_configs import KNOWN_CONFIGS

TOLERANCE = 0.03
"""Published figures have two or three digits."""
PUBLISHED = {
    "LLaMA-7B": 6.738e9,  # arXiv:2302.13971 says 6.7B; MEFT's shares are of 6.738B
    "Llama-2-7B": 6.738e9,  # the same network
    "Llama-3.1-405B": 405e9,  # arXiv:2407.21783
    "Qwen2.5-72B": 72.7e9,  # its model card
    "Mistral-7B-v0.1": 7.24e9,  # its model card
    "DeepSeek-67B": 67e9,  # arXiv:2401.02954
    "DeepSeek-V2-Lite": 15.7e9,  # arXiv:2405.04434, appendix
    "DeepSeek-V2": 236e9,  # arXiv:2405.04434
    "DeepSeek-V3": 671e9,  # arXiv:2412.19437, without the module for the token after the next
    "Mixtral-8x7B": 46.7e9,  # arXiv:2401.04088 says 47B; its announcement 46.7B
    "OLMoE-1B-7B": 6.9e9,  # arXiv:2409.02060
    "Qwen3-30B-A3B": 30.5e9,  # its model card
    "Qwen3-235B-A22B": 235e9,  # its model card
    "gpt-oss-20b": 20.9e9,  # its model card
}
EXPERT = 3 * 2048 * 1408
"""Parameters of one expert of DeepSeek-V2-Lite."""


def plan(name: str, **options: Any) -> TrainingPlan:
    config = RunConfig(**{"model": "m", "dataset": "d", "output_dir": "o", "dtype": "bfloat16", **options})
    return run_skeleton(config, KNOWN_CONFIGS[name]()).state(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_parameters_that_were_published(name: str) -> None:
    full = plan(name, method="full")
    assert full.num_trained == pytest.approx(PUBLISHED[name], rel=TOLERANCE)


def test_a_whole_deepseek_v2_lite_has_the_storage_of_the_esft_paper() -> None:
    """arXiv:2407.01906: 28.6 GB for full fine-tuning. Two bytes a parameter in binary units; 29.3 here."""
    whole = plan("DeepSeek-V2-Lite", method="full")
    assert 2 * whole.num_trained / 2**30 == pytest.approx(28.6, rel=TOLERANCE)


def test_parts_of_deepseek_v2_lite_have_the_parameters_of_the_esft_paper() -> None:
    """Table 3 of arXiv:2407.01906: what was trained with and without shared experts and everything else."""
    routed = plan("DeepSeek-V2-Lite", method="esft", select_top_k=64).num_trained
    with_shared = plan("DeepSeek-V2-Lite", method="esft", select_top_k=64, train_shared_experts=True).num_trained
    everything = plan("DeepSeek-V2-Lite", method="full").num_trained
    assert routed == 64 * 26 * EXPERT
    assert with_shared - routed == 2 * 26 * EXPERT
    assert with_shared - routed == pytest.approx(450e6, rel=TOLERANCE)
    assert everything - routed == pytest.approx(1.3e9, rel=TOLERANCE)


def test_esft_deltas_have_the_storage_of_the_esft_paper() -> None:
    """By tokens, 1.4B parameters and 2.57 GB on average; with shared experts 1.85B. Six experts a layer are nearest.

    By gates, 3.20 GB: between seven and eight experts a layer.
    """
    deltas = {k: 2 * plan("DeepSeek-V2-Lite", method="esft", select_top_k=k).num_trained / 2**30 for k in (6, 7, 8)}
    assert deltas[6] == pytest.approx(2.57, rel=TOLERANCE)
    assert deltas[7] < 3.20 < deltas[8]
    shared = plan("DeepSeek-V2-Lite", method="esft", select_top_k=6, train_shared_experts=True)
    assert shared.num_trained == pytest.approx(1.85e9, rel=TOLERANCE)


def row_parameters(meft: TrainingPlan, num_key_experts: int) -> int:
    """Of the adapter's keys and values, without the routers of its Key-Experts."""
    return meft.num_trained - 32 * num_key_experts * 4096


def test_meft_on_llama_7b_has_the_adapter_of_its_code() -> None:
    """3,600 pairs in 240 Key-Experts a layer, as in its LLaMA scripts: 944M parameters, 15.1 GB to train in float32."""
    meft = plan("LLaMA-7B", method="meft", meft_r=3600, meft_num_key_experts=240, meft_num_active_key_experts=8)
    num_rows_parameters = row_parameters(meft, 240)
    assert num_rows_parameters == pytest.approx(944e6, rel=TOLERANCE)
    router_bytes = 16 * (meft.num_trained - num_rows_parameters)
    trained = meft.trained_bytes + meft.gradient_bytes + meft.optimizer_bytes - router_bytes
    assert trained == pytest.approx(15.1e9, rel=TOLERANCE)


def test_meft_on_llama_7b_moves_what_its_paper_says() -> None:
    """arXiv:2406.04984: 0.56 P an iteration, 3.57 times less than 2 P; P is 6,144 pairs in 32 layers.

    Its cost of a layer, pairs there and their gradients back and the hidden states of 2 x 256 tokens, gives that for
    1,592 of the pairs, so for a quarter of them.
    """
    meft = plan("LLaMA-7B", method="meft", meft_r=6144, meft_num_key_experts=256, meft_num_active_key_experts=8)
    num_parameters = row_parameters(meft, 256)
    config = RunConfig(
        model="-", dataset="-", output_dir="-", method="meft", dtype="float32", meft_r=6144, meft_num_key_experts=256
    )
    found = Estimator(KNOWN_CONFIGS["LLaMA-7B"](), has_host=True).without_activations(config)
    # the paper counts numbers
    rows = 1592 / 6144 * (found.state.row_bytes + found.state.row_gradient_bytes) / 4
    moved = rows + 32 * 2 * 256 * 4096
    assert moved == pytest.approx(0.56 * num_parameters, rel=TOLERANCE)
    assert 2 * num_parameters / moved == pytest.approx(3.57, rel=TOLERANCE)
    assert num_parameters / plan("LLaMA-7B", method="full").num_trained == pytest.approx(0.239, rel=TOLERANCE)
