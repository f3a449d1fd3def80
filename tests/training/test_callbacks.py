"""Peak memory has a beginning; metrics have each step once."""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from metier.data.collate import Collator, PaddingFreeCollator
from metier.data.encode import Encoded
from metier.training.callbacks import (
    MetricsLog,
    StepTimes,
    num_record_tokens,
    peak_memory_bytes,
    reset_peak_memory,
)


def filled(num_megabytes: int) -> mmap.mmap:
    """Memory straight from the system, which gets it back when it is closed; malloc may keep what is freed."""
    block = mmap.mmap(-1, num_megabytes * 2**20)
    for _ in range(num_megabytes):
        block.write(b"x" * 2**20)
    return block


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the host cannot reset its peak")
def test_a_peak_from_before_the_reset_is_forgotten_and_a_new_one_is_seen() -> None:
    filled(400).close()
    before = peak_memory_bytes()
    reset_peak_memory()
    low = peak_memory_bytes()
    filled(400).close()
    assert peak_memory_bytes() > low + 300 * 2**20
    reset_peak_memory()
    assert peak_memory_bytes() < max(before, low + 400 * 2**20) - 300 * 2**20


def test_a_resumed_run_takes_back_the_lines_behind_its_checkpoint_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    log, state = MetricsLog(path, StepTimes(), {}), TrainerState(global_step=3)
    log.on_train_begin(TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_tokens_are_counted_alike_whether_the_batch_is_padded_or_not() -> None:
    lengths = (6, 3, 2, 4, 2)
    items = [Encoded(list(range(3, 3 + n)), list(range(3, 3 + n)), "") for n in lengths]
    padded, free = Collator(0)(items), PaddingFreeCollator(0)(items)
    assert num_record_tokens(padded["attention_mask"], None) == sum(lengths)
    assert num_record_tokens(None, free["position_ids"]) == sum(lengths)
    assert free["position_ids"].numel() == 18


def test_a_steps_time_is_between_its_ends_and_the_first_one_counts_alone_only(tmp_path: Path) -> None:
    times, state, control = StepTimes(), TrainerState(), TrainerControl()
    assert times.usual is None
    args = TrainingArguments(output_dir=str(tmp_path))
    for seconds in (0.2, 0.01, 0.01):
        times.on_step_begin(args, state, control)
        time.sleep(seconds)
        times.on_step_end(args, state, control)
        time.sleep(0.05)  # an evaluation
    assert times.seconds[0] >= 0.2
    assert 0.01 <= times.usual < 0.05
    times.seconds = [0.5]
    assert times.usual == 0.5


def test_a_line_has_the_mean_of_its_steps_and_what_was_foreseen(tmp_path: Path) -> None:
    times = StepTimes()
    log = MetricsLog(tmp_path / "metrics.jsonl", times, {"step_seconds": 2.0, "bottleneck": "products"})
    args, state, control = TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl()
    log.on_train_begin(args, state, control)
    times.seconds = [1.0, 3.0]
    log.on_log(args, state, control, logs={"loss": 1.0})
    times.seconds += [5.0]
    log.on_log(args, state, control, logs={"loss": 1.0})
    log.on_log(args, state, control, logs={"train_runtime": 1.0})
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line.get("step_seconds") for line in lines] == [2.0, 5.0, None]
    assert all(line["foreseen_step_seconds"] == 2.0 and "foreseen_peak_memory_bytes" not in line for line in lines)
