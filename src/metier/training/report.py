"""The report of one run, from what lies in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metier.config import RunConfig
from metier.reports.data import ReportData
from metier.reports.html import write_report
from metier.routing.configured import selection_config
from metier.routing.selection import ExpertSelection
from metier.training.folder import RunFolder, package_versions


def write_run_report(
    folder: RunFolder, config: RunConfig, selection: ExpertSelection | None, *, num_parameters: int
) -> Path:
    """Write `report.html`: routing and selection, losses, a sparse adapter's rows, settings.

    Args:
        folder: of the run, which is over.
        config: of the run.
        selection: what was trained, if experts were selected.
        num_parameters: of the model, what is trained included.
    """
    data = ReportData(
        title=f"metier train: {folder.root.name}",
        model=config.model,
        task=Path(config.dataset).name,
        metrics={config.method: read_metrics(folder.metrics)},
        plans={config.method: read_plan(folder.plan)},
        key_expert_tokens=_key_expert_tokens(folder),
        total_parameters=num_parameters,
        config=asdict(config),
        versions=package_versions(),
        command=f"metier train {folder.config}",
        **routing_data(folder, config, selection),
    )
    return write_report(folder.report, data)


def routing_data(folder: RunFolder, config: RunConfig, selection: ExpertSelection | None) -> dict[str, Any]:
    """What a report shows of a run's routing; empty where it was not profiled, or not scored by routing alone."""
    is_by_routing = config.score != "output_norm" and not config.minus_general
    if selection is None or not is_by_routing or (profile := folder.routing_profile()) is None:
        return {}
    wanted = selection_config(config)
    return {
        "scores_LE": profile.scores_LE(config.score).tolist(),
        "layer_ids": profile.layer_ids,
        "score_name": config.score,
        "top_p": wanted.top_p,
        "top_k": profile.top_k,
        "selected": selection.experts,
        # what a budget picks depends on the experts' sizes, which a folder does not say
        "reliability": None if wanted.budget_bytes is not None else profile.reliability(wanted),
        "num_profiled_tokens": profile.num_tokens,
    }


def _key_expert_tokens(folder: RunFolder) -> dict[str, list[int]]:
    path = folder.key_expert_tokens
    found: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))["tokens"] if path.exists() else {}
    return found


def read_metrics(path: Path) -> list[dict[str, object]]:
    """The lines of a metrics.jsonl; none where nothing was logged."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_plan(path: Path) -> dict[str, Any]:
    """A run's plan.json."""
    plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return plan
