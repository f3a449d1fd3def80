"""A cell's runner that is made up, and a console that keeps what it is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from metier.evaluation.comparison import child

RUNNER = """
import json, os, sys, time
from pathlib import Path
from metier.evaluation.comparison.child import end_with_starter
end_with_starter()
folder = Path(sys.argv[1])
spec = json.loads((folder / "cell.json").read_text())
cell, profiles = spec["cell"], Path(spec["profiles"])
print("runs", cell["label"], flush=True)
known = sorted(path.name for path in profiles.iterdir()) if profiles.exists() else []
score = 1.0
{what}
(profiles / cell["label"]).mkdir(parents=True, exist_ok=True)
(profiles / cell["label"] / "profile.json").write_text("{{}}")
(folder / "run").mkdir()
(folder / "run" / "plan.json").write_text("{{}}")
(folder / "run" / "a.safetensors").write_text("large")
found = {{"validation": score, "test": {{"metric": "m", "score": score, "item_scores": [score]}}, "seconds": 0.1,
    "bits_per_byte": {{"prose": 1.0}}, "samples": [], "versions": {{}}, "hardware": {{}}, "merges": True,
    "cwd": os.getcwd(), "threads": os.environ["OMP_NUM_THREADS"], "known": known, "folder": str(folder)}}
(folder / "result.json").write_text(json.dumps(found))
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have cells run `what`, a few lines of Python, and then find what is the same for all."""

    def make(what: str = "") -> None:
        folder = tmp_path / "runners"
        folder.mkdir(exist_ok=True)
        (folder / "made_up_runner.py").write_text(RUNNER.format(what=what))
        monkeypatch.setattr(child, "RUNNER", "made_up_runner")
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    return make


@pytest.fixture
def told() -> Console:
    return Console(file=StringIO(), width=1000)
