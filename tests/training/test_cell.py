"""One cell of a comparison, as its process runs it: trained, measured, and nothing large left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metier.errors import ConfigError
from metier.evaluation.comparison.cells import SPEC
from metier.evaluation.comparison.config import BASE
from metier.training.cell import run_cell
from metier.training.run import Foresight


@pytest.fixture
def task(records: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sums"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps({"name": "sums", "metrics": ["chrf"], "max_new_tokens": 8}))
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(records.read_text())
    return folder


@pytest.fixture
def cell(base: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a candidate's cell and gives its folder and its result."""
    monkeypatch.setattr(Foresight, "before_loading", lambda self: None)
    monkeypatch.setattr(Foresight, "before_training", lambda self, *_, **__: {"peak_memory_bytes": 7.0})

    def run(label: str, **candidate: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / "cells" / label
        folder.mkdir(parents=True, exist_ok=True)
        spec = {
            "cell": {"task": str(task), "label": label, "learning_rate": 1e-2, "seed": 1},
            "candidate": {"label": label, "learning_rate": 1e-2, "experts": "relevant", "run": {}, **candidate},
            "model": str(base),
            "run": {"max_steps": 2, "max_length": 128},
            "test_items": 4,
            "validation_items": 2,
            "general_bytes": 300,
            "profile_tokens": 512,
            "profiles": str(tmp_path / "profiles"),
        }
        (folder / SPEC).write_text(json.dumps(spec))
        run_cell(folder)
        return folder, json.loads((folder / "result.json").read_text())

    return run


def test_the_base_is_measured_and_not_trained(cell) -> None:
    folder, result = cell(BASE)
    assert not (folder / "run").exists()
    assert result["test"]["metric"] == "chrf"
    assert len(result["test"]["item_scores"]) == 4
    assert len(result["bits_per_byte"]) == 10
    assert result["added_kv_bytes"] == 0


def test_a_run_has_its_costs_and_leaves_no_weights(cell) -> None:
    folder, result = cell("esft", method="esft", run={"top_p": 0.5})
    assert result["trained_parameters"] > 0
    assert result["delta_bytes"] > 0
    assert result["step_seconds"] > 0
    assert result["foreseen_peak_bytes"] == 7
    assert result["merges"]
    assert result["versions"]["metier"]
    assert list(folder.rglob("*.safetensors")) == []
    # a killed run is begun anew in its folder
    assert cell("esft", method="esft", run={"top_p": 0.5})[1]["test"] == result["test"]


def test_controls_are_other_experts_and_as_many(cell) -> None:
    chosen = {}
    for experts in ("relevant", "random", "coldest"):
        folder, result = cell(experts, method="esft", experts=experts, run={"top_p": 0.5})
        chosen[experts] = json.loads((folder / "selection.json").read_text())["experts"]
        assert result["num_experts"] == sum(len(ids) for ids in chosen[experts].values())
    assert chosen["relevant"] != chosen["coldest"]
    assert len({json.dumps({n: len(x) for n, x in c.items()}) for c in chosen.values()}) == 1


@pytest.mark.parametrize(("method", "run"), [("prompt", {"num_virtual_tokens": 4}), ("fishmask", {}), ("full", {})])
def test_other_methods_run_too(cell, method: str, run: dict) -> None:
    result = cell(method, method=method, run=run)[1]
    if method == "prompt":
        assert result["added_kv_bytes"] > 0
    assert (result["added_latency"] is None) == (method == "full")


def test_a_task_without_training_records_is_refused(cell, task: Path) -> None:
    (task / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match="has no split `train`, which a comparison trains on"):
        cell("esft", method="esft")
