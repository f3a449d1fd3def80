"""Peak memory has a beginning; metrics have each step once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from metier.training.callbacks import MetricsLog, peak_memory_bytes, reset_peak_memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the host cannot reset its peak")
def test_a_peak_from_before_the_reset_is_forgotten_and_a_new_one_is_seen() -> None:
    block = torch.ones(100_000_000)
    before = peak_memory_bytes()
    del block
    reset_peak_memory()
    low = peak_memory_bytes()
    assert low < before - 200_000_000
    block = torch.ones(100_000_000)
    assert peak_memory_bytes() > low + 200_000_000
    del block


def test_a_resumed_run_takes_back_the_lines_behind_its_checkpoint_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    log, state = MetricsLog(path), TrainerState(global_step=3)
    log.on_train_begin(TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
