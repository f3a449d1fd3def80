"""The comparison's page, picture, words and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from html_page import Page
from metier.evaluation.comparison.cells import Cell, Cells
from metier.evaluation.comparison.config import BASE, FULL, Candidate, ComparisonConfig, with_full
from metier.reports.comparison import FRONT, OTHER, write_comparison


@pytest.fixture
def cells(tmp_path: Path) -> Cells:
    candidates = (
        Candidate(label="ESFT", method="esft", learning_rate=1e-3, run={"top_p": 0.5}),
        Candidate(label="<b>LoRA</b>", method="lora", learning_rate=1e-2, run={"r": 4}),
    )
    config = ComparisonConfig(
        output_dir=str(tmp_path / "out"), model="embedded", tasks=("synopsis", "sections"), candidates=candidates
    )
    return Cells(with_full(config))


def fill(cells: Cells) -> Cells:
    scores = {BASE: 10.0, FULL: 20.0, "ESFT": 20.0, "<b>LoRA</b>": 15.0}
    while pending := cells.pending():
        for cell in pending:
            _write(cells, cell, scores[cell.label])
        cells = Cells(cells.config)
    return cells


def _write(cells: Cells, cell: Cell, score: float) -> None:
    folder = cells.folder(cell)
    folder.mkdir(parents=True)
    result = {
        "validation": score, "test": {"metric": "rouge_l", "score": score, "item_scores": [score] * 5},
        "bits_per_byte": {"prose": 1.0 if cell.is_base else 1.2}, "merges": True, "trained_parameters": 1000, "delta_bytes": 4000,
        "device_peak_bytes": None, "host_peak_bytes": 2**30, "step_seconds": 1.5, "foreseen_peak_bytes": 2**30,
        "foreseen_step_seconds": 1.4, "added_latency": 0.1, "added_kv_bytes": 0, "seconds": 1.0, "versions": {"metier": "0"},
        "hardware": {"cpu": "one"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def test_the_page_has_every_method_and_escapes_names(cells: Cells) -> None:
    path = write_comparison(fill(cells))
    text = path.read_text()
    assert "ESFT" in Page(text).words
    assert "<b>LoRA</b>" not in text
    assert "&lt;b&gt;LoRA" in text
    assert text.count("<figure") == 8
    assert (path.parent / "comparison.png").stat().st_size > 10_000


def test_ties_and_fronts_are_told_apart_by_shape_and_colour(cells: Cells) -> None:
    page = Page(write_comparison(fill(cells)).read_text())
    dots = [(tag, found["fill"]) for tag, found in page.elements if found.get("class") == "dot"]
    # of three methods full fine-tuning and ESFT are tied, and cost the same
    assert [tag for tag, _ in dots].count("rect") == 2 * 8
    assert [tag for tag, _ in dots].count("circle") == 8
    assert {color for tag, color in dots if tag == "circle"} == {OTHER}
    assert FRONT in {color for tag, color in dots if tag == "rect"}
    assert "Square: tied with the best score." in " ".join(page.words.split())


def test_a_cache_of_its_own_is_no_blank(cells: Cells) -> None:
    filled = fill(cells)
    for path in (cells.root / "cells").glob("*LoRA*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_kv_bytes": None, "added_latency": 0.3}))
    text = write_comparison(Cells(filled.config)).read_text()
    assert "a second one, of the network beside it" in text
    assert "30%; nothing once merged" in text


def test_the_words_say_ties_as_ties(cells: Cells) -> None:
    path = write_comparison(fill(cells))
    words = json.loads((path.parent / "comparison.json").read_text())["summary"]["synopsis"]
    assert words[0] == (
        "full fine-tuning has the highest score, 20.0 (the untouched base 10.0), but its lead over ESFT is within the noise."
    )


def test_the_json_has_settings_versions_hardware_and_failures(cells: Cells) -> None:
    failed = cells.folder(cells.pending()[2])
    failed.mkdir(parents=True)
    (failed / "failure.txt").write_text("exit code 1\nOutOfMemory\n")
    content = json.loads((write_comparison(fill(cells)).parent / "comparison.json").read_text())
    assert list(content["failures"].values()) == ["OutOfMemory"]
    assert content["versions"] == [{"metier": "0"}]
    assert content["hardware"] == [{"cpu": "one"}]
    assert content["config"]["learning_rate_factors"] == [1 / 3, 1.0, 3.0]
    assert [row["label"] for row in content["over_tasks"]] == [FULL, "ESFT", "<b>LoRA</b>"]


def test_a_report_of_nothing_says_so(cells: Cells) -> None:
    assert "0 of 32 runs are done" in write_comparison(cells).read_text()


def test_a_report_of_what_is_there_needs_no_torch(cells: Cells, tmp_path: Path) -> None:
    """Which keeps it within seconds, on any machine."""
    fill(cells)
    methods = [
        {"label": c.label, "method": c.method, "learning_rate": c.learning_rate, **c.run}
        for c in cells.config.candidates
    ]
    values = {
        "output_dir": cells.config.output_dir,
        "model": "embedded",
        "tasks": ["synopsis", "sections"],
        "methods": methods,
    }
    (tmp_path / "comparison.yaml").write_text(json.dumps(values))
    code = f"""
import sys
from typer.testing import CliRunner
from metier.cli import app
result = CliRunner().invoke(app, ["compare", {str(tmp_path / "comparison.yaml")!r}])
assert "Report:" in result.output, result.output
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_says_whose_seconds_they_are(cells: Cells) -> None:
    for cell in fill(cells).known():
        if cell.label == "ESFT":
            path = cells.folder(cell) / "result.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": {"cpu": "another"}}))
    words = Page(write_comparison(Cells(cells.config)).read_text()).words
    assert "Seconds are those of the runs on: one. Not run there: ESFT." in words
