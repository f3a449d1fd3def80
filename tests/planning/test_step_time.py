"""What a step spends its time on, what it moves, and what former runs teach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metier.config import RunConfig
from metier.errors import ConfigError
from metier.planning import learning
from metier.planning.clock import DeviceClock
from metier.planning.devices import Device
from metier.planning.estimate import Estimate, Estimator
from metier.planning.fit import Budget
from metier.planning.machine import Machine, fingerprint
from metier.planning.step import Batch
from metier.planning.step_time import StepTime, step_time
from tiny_models import tiny_model

DEVICE = Device("d", 1 << 30, 1e12, {torch.float32: 1e12}, 1e9 / 0.8, "a test", launch_seconds=0.0)
CLOCK = DeviceClock(DEVICE, disk_bandwidth=1e6)


def estimate(**keys: object) -> Estimate:
    config = RunConfig(model="m", dataset="d", output_dir="-", **{"dtype": "float32", "max_length": 32, **keys})
    return Estimator(tiny_model("deepseek_v2").config)(config, Batch(2, 32))


def test_accumulated_batches_take_their_time_and_one_optimizers_step() -> None:
    once = step_time(estimate(method="full"), CLOCK)
    often = step_time(estimate(method="full", gradient_accumulation_steps=4), CLOCK)
    assert often.parts["products"] == pytest.approx(4 * once.parts["products"])
    assert often.parts["optimizer"] == once.parts["optimizer"] > 0


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 2), (True, 3)])
def test_a_stored_base_comes_once_a_pass(checkpointing: bool, passes: int) -> None:
    found = estimate(
        method="esft", select_top_k=2, base_store="disk", gradient_checkpointing=checkpointing, base_format="int8"
    )
    taken = step_time(found, CLOCK)
    assert taken.moved_bytes == {"host": 0, "disk": passes * found.state.stored_bytes}
    assert taken.seconds == taken.moves["disk"] == pytest.approx(passes * found.state.stored_bytes / 1e6)
    assert taken.bottleneck == "what comes from the disk"
    assert taken.parts["decoding"] > 0


def test_what_memory_has_room_for_is_not_read_in_every_step() -> None:
    found = estimate(method="esft", select_top_k=2, base_store="disk", base_format="int8")
    assert step_time(found, CLOCK, free_bytes=found.disk_bytes).moved_bytes["disk"] == 0
    assert step_time(found, CLOCK, free_bytes=found.disk_bytes - 1).moved_bytes["disk"] == 2 * found.state.stored_bytes
    one_memory, apart = Budget(found.total_device_bytes + 100, None, 40), Budget(1, found.host_bytes + 30)
    assert (one_memory.free_bytes(found), apart.free_bytes(found)) == (60, 30)
    assert Budget(1, None).free_bytes(found) == 0


def test_rows_that_fire_and_their_gradients_are_moved() -> None:
    found = estimate(method="meft", meft_r=64, meft_store="host", meft_top_k=1)
    fired = 1 - (1 - 1 / 64) ** 64
    assert step_time(found, CLOCK).moved_bytes["host"] == pytest.approx(2 * fired * found.state.row_bytes, rel=1e-3)
    half = estimate(method="meft", meft_r=64, meft_store="host", meft_top_k=1, meft_row_dtype="bfloat16")
    # rows of two bytes a number come, gradients of four go
    assert half.state.row_bytes == found.state.row_bytes // 2
    assert step_time(half, CLOCK).moved_bytes["host"] == pytest.approx(1.5 * fired * found.state.row_bytes, rel=1e-3)
    assert step_time(half, CLOCK).parts["optimizer"] == step_time(found, CLOCK).parts["optimizer"]
    device = estimate(method="meft", meft_r=64, meft_store="device", meft_top_k=1)
    assert step_time(device, CLOCK).moved_bytes == {"host": 0, "disk": 0}


def test_a_plan_of_rows_on_disk_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = estimate(method="meft", meft_r=64, meft_store="disk")
    assert found.trace is not None
    assert step_time(found, CLOCK).moved_bytes["disk"] > 2 * found.state.row_bytes
    assert list(tmp_path.iterdir()) == []


def test_the_bottleneck_is_what_takes_longest() -> None:
    taken = StepTime({"products": 1.0, "attention": 2.0}, {"host": 1.0, "disk": 0.0}, {}, 1.0)
    assert (taken.bottleneck, taken.seconds) == ("attention", 3.0)
    assert StepTime({"products": 1.0}, {"host": 1.5, "disk": 0.0}, {}, 1.0).bottleneck == "what comes from the host"


def _run(folder: Path, name: str, *, factor: float, workspace: int, **changed: object) -> None:
    """One that foresaw 2 s of operations times 1.1 and 0.5 s of others, and 1,000 bytes beside its workspace."""
    predicted = {"step_seconds": 2.7, "operation_seconds": 2.0, "in_a_step": 1.1, "peak_memory_bytes": 1054}
    predicted |= {"workspace_bytes": 54, "machine": fingerprint(), "bottleneck": "products", **changed}
    measured = {"step_seconds": 0.5 + 2.0 * factor, "peak_memory_bytes": 1000 + workspace}
    (folder / name).mkdir(parents=True)
    (folder / name / "plan.json").write_text(json.dumps({"predicted": predicted, "measured": measured}))


def test_former_runs_teach_their_medians(tmp_path: Path) -> None:
    for name, factor, workspace in (("a", 1.2, 10), ("b", 1.5, 80), ("c/d", 3.0, 90)):
        _run(tmp_path, name, factor=factor, workspace=workspace)
    _run(tmp_path, "of another machine", factor=9.0, workspace=0, machine="x")
    _run(tmp_path, "waited for its disk", factor=9.0, workspace=0, bottleneck="what comes from the disk")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "plan.json").write_text("{")
    (tmp_path / "not over").mkdir()
    (tmp_path / "not over" / "plan.json").write_text('{"predicted": {}, "measured": null}')
    machine = Machine()
    lesson = learning.learn(machine, tmp_path)
    assert (lesson.num_runs, lesson.workspace_bytes) == (3, 90)
    assert lesson.in_a_step == pytest.approx(1.5)
    assert machine.learned["in_a_step"] == lesson.in_a_step


def test_without_runs_there_is_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run of this machine says both"):
        learning.learn(Machine(), tmp_path)
