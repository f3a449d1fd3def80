"""A comparison whose runs are made up: what a cell would have found is written into its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metier.evaluation.comparison.cells import RESULT, Cell, Cells
from metier.evaluation.comparison.config import Candidate, ComparisonConfig, with_full


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., ComparisonConfig]:
    def make(**changes: Any) -> ComparisonConfig:
        candidates = (
            Candidate(label="ESFT", method="esft", learning_rate=1e-3, run={"top_p": 0.5}),
            Candidate(label="LoRA", method="lora", learning_rate=1e-2),
        )
        values = {
            "output_dir": str(tmp_path / "out"),
            "model": "embedded",
            "tasks": ("synopsis",),
            "candidates": candidates,
            **changes,
        }
        return with_full(ComparisonConfig(**values))

    return make


@pytest.fixture
def write() -> Callable[..., None]:
    """Write what a cell found: its score on validation and test, the same on every item unless items are given."""

    def written(cells: Cells, cell: Cell, score: float, *, validation: float | None = None, **changes: Any) -> None:
        folder = cells.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        items = changes.pop("items", [score] * 20)
        result = {
            "validation": score if validation is None else validation,
            "test": {"metric": "rouge_l", "score": score, "item_scores": items},
            "bits_per_byte": {"prose": 1.0, "python": 2.0},
            "merges": True,
            "trained_parameters": 1000,
            "delta_bytes": 4000,
            "device_peak_bytes": None,
            "host_peak_bytes": 2**30,
            "step_seconds": 1.5,
            "foreseen_peak_bytes": 2**30,
            "foreseen_step_seconds": 1.4,
            "added_latency": 0.1,
            "added_kv_bytes": 0,
            "seconds": 10.0,
            "versions": {"metier": "0"},
            "hardware": {"cpu": "one"},
            **changes,
        }
        (folder / RESULT).write_text(json.dumps(result))

    return written
