"""Experts that transformers has parted among processes are refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distributed.launch import command
from metier.errors import UnsupportedModelError
from metier.models.moe import moe_layers
from tiny_models import tiny_model, tiny_tokenizer


@pytest.mark.distributed
@pytest.mark.slow
def test_a_model_loaded_with_ep_size_is_refused(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    script = str(Path(__file__).with_name("expert_parallel.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = command([sys.executable, *launcher, script, str(tmp_path)])
    assert done.code == 0, done.text
    assert "SAID model.layers.0.mlp.experts: its experts are parted among processes" in done.text


def test_the_mark_that_transformers_leaves_is_what_is_looked_at() -> None:
    model = tiny_model("qwen3_moe")
    assert not model.model.layers[1].mlp.experts._is_expert_parallel, "transformers no longer marks experts so"
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mlp\.experts: .*parted among processes by transformers"
    ):
        moe_layers(model)
