"""Cells run in processes of their own: a crash loses one, a second call goes on where the first stopped."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from metier.evaluation.comparison import child
from metier.evaluation.comparison.cells import Cells
from metier.evaluation.comparison.here import Here
from metier.evaluation.comparison.schedule import run_cells

RUNNER = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
spec = json.loads((folder / "cell.json").read_text())
cell = spec["cell"]
print("runs", cell["label"])
if cell["label"] == "LoRA" and cell["seed"] == 0 and cell["learning_rate"] < 0.005:
    os.kill(os.getpid(), 9)
if cell["label"] == "LoRA" and cell["learning_rate"] > 0.02:
    raise ValueError("it diverged")
found = {"validation": 1.0, "test": {"metric": "m", "score": 1.0, "item_scores": [1.0]}, "seconds": 0.1, "ran": os.getpid()}
# whole or not at all, as a cell does
(folder / "part").write_text(json.dumps(found))
(folder / "part").replace(folder / "result.json")
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up_runner.py").write_text(RUNNER)
    monkeypatch.setattr(child, "RUNNER", "made_up_runner")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def console() -> Console:
    return Console(file=StringIO(), width=200)


def test_all_cells_run_and_a_crash_loses_one(comparison, runner) -> None:
    told = console()
    cells = Cells(comparison())
    run_cells(cells, Here(3), console=told)
    assert cells.pending() == []
    low, high = cells.failed()
    assert cells.failure(low).startswith("killed")
    assert "runs LoRA" in cells.failure(low)
    assert cells.failure(high).startswith("exit code 1")
    assert "it diverged" in cells.failure(high)
    assert "failed (killed)" in told.file.getvalue()
    done = [cell for cell in cells.known() if cells.result(cell) is not None]
    assert len(done) == cells.num_needed() - 2


def test_what_is_done_is_not_run_again(comparison, runner) -> None:
    run_cells(Cells(comparison()), Here(3), console=console())
    cells = Cells(comparison())
    before = {cell: cells.result(cell) for cell in cells.known()}
    run_cells(Cells(comparison()), Here(3), console=console())
    again = Cells(comparison())
    assert {cell: again.result(cell) for cell in again.known()} == before


def test_no_run_is_begun_when_time_is_up(comparison, runner) -> None:
    cells = Cells(comparison())
    run_cells(cells, Here(), console=console(), minutes=0)
    assert len(cells.pending()) == len(list(cells.known()))
