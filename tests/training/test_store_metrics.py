"""What stores did in a step, without what an evaluation or a checkpoint between steps did."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import metier
from metier.memory.frozen_model import frozen_weights
from metier.memory.meter import Meter
from metier.methods.meft import MeftConfig, MeftLayer
from metier.training.store_metrics import CountFrozen, CountRows
from tiny_models import tiny_model, tiny_tokenizer


def log_of_two_steps(callback: TrainerCallback, model: torch.nn.Module, meter: Meter, folder: Path) -> dict[str, float]:
    """Of two steps of two bytes each, with an evaluation before, between and after them."""
    told = (TrainingArguments(output_dir=str(folder), use_cpu=True), TrainerState(), TrainerControl())
    callback.on_train_begin(*told, model=model)
    logs = {"loss": 1.0}
    for step in (1, 2):
        meter.bytes_from_disk += 1000
        meter.stall_seconds += 1000
        callback.on_step_begin(*told)
        meter.bytes_from_disk += 2
        meter.stall_seconds += 3
        told[1].global_step = step
        callback.on_step_end(*told)
    meter.bytes_from_disk += 1000
    callback.on_log(*told, logs=logs)
    return logs


def test_rows_that_move_between_steps_are_counted_to_none(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model("deepseek_v2"), MeftConfig(r=64, num_active_key_experts=4, top_k=8))
    layer = next(module for module in model.modules() if isinstance(module, MeftLayer))
    logs = log_of_two_steps(CountRows(), model, layer.stores["default"].meter, tmp_path)
    assert logs["row_bytes_from_disk"] == 2
    assert logs["row_stall_seconds"] == pytest.approx(3)


def test_frozen_weights_that_are_read_between_steps_are_counted_to_none(tmp_path: Path) -> None:
    tiny_model("deepseek_v2").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = metier.load_frozen(tmp_path / "base").model
    meter = next(iter(frozen_weights(model))).store.meter
    logs = log_of_two_steps(CountFrozen(), model, meter, tmp_path)
    assert logs["base_bytes_from_disk"] == 2
    assert logs["base_stall_seconds"] == pytest.approx(3)


def test_meters_of_one_store_add_up() -> None:
    first, second = Meter(2, 10), Meter(2, 10)
    first.used([0], [3])
    second.used([0, 1], [1, 2])
    second.num_rows_updated = 5
    first.add(second)
    assert (first.num_blocks_used, first.num_rows_updated, first.tokens_by_block) == (3, 5, [4, 2])
    assert (first.num_blocks, first.block_bytes) == (2, 10)
