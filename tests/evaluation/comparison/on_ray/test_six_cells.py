"""The command of docs/scale.md: six real runs on Ray find what they find without it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from documented_commands import blocks, words_of

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PAGE = (Path(__file__).parents[4] / "docs" / "scale.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Sweeps on Ray\n")[2].partition("\n## ")[0]
SECONDS = 1500
"""Of six runs on two cores, each with the start of its process."""
DEPENDS_ON_THE_HOUR = {
    "seconds",
    "train_seconds",
    "step_seconds",
    "foreseen_step_seconds",
    "added_latency",
    "host_peak_bytes",
    "foreseen_peak_bytes",
}


def run(line: str, here: Path) -> str:
    """What the command says; `metier` is the one beside this very Python."""
    begun = time.monotonic()
    done = subprocess.run(words_of(line), cwd=here, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    print(f"{line}: {time.monotonic() - begun:.0f} s")
    return done.stdout


def results(root: Path) -> dict[str, dict[str, Any]]:
    """Of each cell by its folder."""
    found = {path.parent.name: json.loads(path.read_text()) for path in root.glob("cells/*/result.json")}
    return {
        name: {key: value for key, value in one.items() if key not in DEPENDS_ON_THE_HOUR}
        for name, one in found.items()
    }


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_six_runs_on_ray_find_what_they_find_without(tmp_path: Path) -> None:
    (comparison,), (line,) = blocks(SECTION, "yaml"), blocks(SECTION)
    (tmp_path / "comparison.yaml").write_text(comparison)
    (tmp_path / "here.yaml").write_text(comparison.replace("comparisons/six", "comparisons/here"))
    told = run(line.strip(), tmp_path)
    run("metier compare here.yaml --jobs 2", tmp_path)
    on_ray, here = (results(tmp_path / "comparisons" / name) for name in ("six", "here"))
    assert len(on_ray) == 6
    assert on_ray == here
    assert files(tmp_path / "comparisons" / "six") == files(tmp_path / "comparisons" / "here")
    # the lines of progress are ours alone
    assert [line.split("  ")[0] for line in told.splitlines() if " of " in line] == [f"{n} of 6" for n in range(1, 7)]
    assert "Report: comparisons/six/comparison.html" in told
