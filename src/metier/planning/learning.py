"""What runs of this machine teach the next plan: how operations in a step differ from operations by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from metier.errors import ConfigError
from metier.planning.clock import IN_A_STEP, PARTS
from metier.planning.machine import Machine, fingerprint

_LEAST, _MOST = 0.7, 3.0
"""What operations may take in a step over what they take by themselves; anything else was measured wrongly."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What former runs have in common."""

    num_runs: int
    in_a_step: float
    """As `clock.IN_A_STEP`: the median."""
    workspace_bytes: int
    """As `budget.WORKSPACE_BYTES`: of four runs, three took less."""


def calibrate(runs: Path) -> str:
    """Learn from former runs; without any, forget what was measured here, so that the next plan does it again.

    Args:
        runs: their folder.

    Returns:
        What came of it, in words.
    """
    machine = Machine.load()
    try:
        lesson = learn(machine, runs)
    except ConfigError as error:
        machine.forget()
        machine.save()
        return f"This machine will be measured anew. {error}"
    if not _LEAST <= lesson.in_a_step <= _MOST:
        machine.forget()
        machine.save()
        return (
            f"This machine will be measured anew: by {lesson.num_runs} runs in {runs} operations would take "
            f"{lesson.in_a_step:.2f} times as long in a step as they were measured by themselves."
        )
    machine.save()
    return (
        f"{lesson.num_runs} runs in {runs} say that operations take {lesson.in_a_step:.2f} times as long in a step as "
        f"by themselves (without runs {IN_A_STEP} is assumed), and that {lesson.workspace_bytes / 2**20:.0f} MiB are "
        "taken beside tensors."
    )


def learn(machine: Machine, folder: Path) -> Lesson:
    """Read what runs foresaw and what they took, and keep it with the machine.

    Args:
        machine: this one.
        folder: of runs; their plan.json are looked for in all folders below it. Those of other machines are left out.

    Raises:
        ConfigError: there is none that can teach anything.
    """
    runs = list(_runs(folder))
    if not runs:
        raise ConfigError(
            f"calibrate: got {folder}, where no run of this machine says both what was foreseen and what it took; "
            "expected a folder of runs, each with a plan.json that `metier train` wrote. Train one, then calibrate."
        )
    factors, workspaces = zip(*(_lesson(*run) for run in runs), strict=True)
    upper = sorted(workspaces)[3 * (len(runs) - 1) // 4 + (len(runs) > 1)]
    lesson = Lesson(len(runs), median(factors), max(0, round(upper)))
    machine.learned = {
        "num_runs": lesson.num_runs,
        "in_a_step": lesson.in_a_step,
        "workspace_bytes": lesson.workspace_bytes,
    }
    machine.is_changed = machine.has_learned = True
    return lesson


def _runs(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for path in sorted(folder.rglob("plan.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            foreseen, measured = content["predicted"], content["measured"]
            # a run that waited for its disk says nothing of what it computed
            has_computed = (
                not foreseen.get("machine_was_busy")
                and foreseen["bottleneck"] in PARTS
                and foreseen["operation_seconds"] > 0
            )
            if foreseen["machine"] == fingerprint() and has_computed:
                _lesson(foreseen, measured)
                yield foreseen, measured
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _lesson(foreseen: dict[str, Any], measured: dict[str, Any]) -> tuple[float, float]:
    beside = foreseen["step_seconds"] - foreseen["in_a_step"] * foreseen["operation_seconds"]
    factor = max(0.0, measured["step_seconds"] - beside) / foreseen["operation_seconds"]
    tensors = foreseen["peak_memory_bytes"] - foreseen["workspace_bytes"]
    return factor, measured["peak_memory_bytes"] - tensors
