"""`metier demo`: the whole walk on the embedded model, with baselines beside it, and a report to look at."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from metier import embedded
from metier.config import RunConfig
from metier.evaluation.compare import ComparisonRow, MethodRun, compare
from metier.evaluation.evaluate import evaluate
from metier.evaluation.result import Evaluation
from metier.evaluation.tasks import load_task
from metier.models.load import load
from metier.reports.console import comparison_table
from metier.reports.data import ReportData
from metier.reports.html import write_report
from metier.routing.selection import ExpertSelection
from metier.training.folder import RunFolder, package_versions
from metier.training.report import read_metrics, read_plan, routing_data
from metier.training.run import RunResult, train

Method = Literal["esft", "full", "lora"]

LEARNING_RATES: dict[Method, float] = {"esft": 2e-3, "full": 3e-4, "lora": 5e-3}
"""From a short search on `synopsis`; `benchmarks/quality.py` sweeps them for every task."""

EVALUATION: dict[str, Any] = {"limit": 100, "general_bytes": 6_000, "cloze_items": 120}
"""A part of what `metier evaluate` measures: the demo has to end within minutes on two cores."""


def demo_config(method: Method, task: str, output: Path, seed: int) -> RunConfig:
    """How the demo trains: the same data, steps and schedule for every method, each at its own learning rate."""
    return RunConfig(
        model="embedded",
        dataset=str(embedded.task_path(task, "train")),
        output_dir=str(output),
        method=method,
        dtype="float32",
        top_p=0.5 if method == "esft" else None,
        profile_tokens=65_536,
        learning_rate=LEARNING_RATES[method],
        per_device_train_batch_size=16,
        padding_free=True,
        max_steps=80,
        warmup_steps=4,
        logging_steps=4,
        max_length=320,
        seed=seed,
    )


def run_demo(task: str, output: Path, baselines: bool, seed: int, *, console: Console | None = None) -> Path:
    """Profile, select, train, evaluate and report on one embedded task.

    Args:
        task: an embedded task's name.
        output: the run's folder; where it is taken, the next free name with a number is used.
        baselines: train full fine-tuning and LoRA on all experts too.
        seed: of the data's order.

    Returns:
        The run's folder, with `report.html` in it.
    """
    console, started = console or Console(), time.monotonic()
    root = free_folder(output)
    base = load("embedded", dtype="float32")
    console.rule("the base, before training")
    before = evaluate(base.model, base.tokenizer, task=task, **EVALUATION)
    methods: list[Method] = ["esft", "full", "lora"] if baselines else ["esft"]
    runs, evaluations = [], {"base": before}
    selection: ExpertSelection | None = None
    for method in methods:
        console.rule(method)
        folder = root if method == "esft" else root / "baselines" / method
        result = train(demo_config(method, task, folder, seed), console=console)
        selection = selection or result.selection
        evaluation = evaluate(result.model, result.tokenizer, task=task, **EVALUATION)
        evaluations[method] = evaluation
        runs.append(_method_run(method, result, evaluation))
    _save_evaluations(root / "evaluation.json", evaluations)
    rows = compare(before, runs, reference="full" if baselines else None)
    total = sum(parameter.numel() for parameter in base.model.parameters())
    console.rule("result")
    console.print(comparison_table(rows, title=f"{task} on the embedded model", total_parameters=total))
    assert selection is not None
    report = write_report(root / "report.html", _report_data(task, root, rows, evaluations, selection, total, seed))
    console.print(f"Report: {report}  ({time.monotonic() - started:.0f} s in all)")
    return root


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of `wanted-2`, `wanted-3` … that is not there."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def _method_run(method: str, result: RunResult, evaluation: Evaluation) -> MethodRun:
    weights = [path for path in (result.folder / "adapter").iterdir() if path.suffix == ".safetensors"]
    return MethodRun(
        name=method,
        evaluation=evaluation,
        trainable_parameters=result.plan.num_trained,
        delta_bytes=sum(path.stat().st_size for path in weights),
        train_seconds=result.train_seconds,
        peak_memory_bytes=result.peak_memory_bytes,
    )


def _save_evaluations(path: Path, evaluations: dict[str, Evaluation]) -> None:
    content = {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _report_data(
    task: str,
    root: Path,
    rows: Sequence[ComparisonRow],
    evaluations: dict[str, Evaluation],
    selection: ExpertSelection,
    total_parameters: int,
    seed: int,
) -> ReportData:
    config = demo_config("esft", task, root, seed)
    folders = {"esft": root, **{name: root / "baselines" / name for name in evaluations if name in ("full", "lora")}}
    return ReportData(
        title=f"metier demo: {task}",
        model="embedded",
        task=task,
        task_description=load_task(task).description,
        **routing_data(RunFolder(root), config, selection),
        metrics={name: read_metrics(RunFolder(folder).metrics) for name, folder in folders.items()},
        plans={name: read_plan(RunFolder(folder).plan) for name, folder in folders.items()},
        evaluations=evaluations,
        rows=rows,
        total_parameters=total_parameters,
        model_bytes=sum(path.stat().st_size for path in embedded.model_path().glob("*.safetensors")),
        config=asdict(config),
        versions=package_versions(),
        command=f"metier demo {task} --seed {seed}",
    )
