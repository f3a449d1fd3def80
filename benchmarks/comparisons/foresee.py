"""Write what the planner foresees beside runs of a comparison that were made before it could plan their methods.

    python benchmarks/comparisons/foresee.py benchmarks/comparisons/embedded.yaml

A prediction needs the run's configuration, base and records, and nothing of what the run measured. It is made as
`metier train` makes it, in a process of its own for each method and task, and written into the results that have none.
Learning rates and seeds make no difference to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from metier.evaluation.comparison.cells import RESULT, Cell, Cells
from metier.evaluation.comparison.config import load_comparison

NAMES = {"peak_memory_bytes": "foreseen_peak_bytes", "step_seconds": "foreseen_step_seconds"}


def main(comparison: str) -> None:
    """Ask for each method on each task once; what is there already stays."""
    cells = Cells(load_comparison(comparison))
    lacking = defaultdict(list)
    for cell in cells.known():
        result = None if cell.is_base else cells.result(cell)
        if result is not None and any(result.get(name) is None for name in NAMES.values()):
            lacking[cell.task, cell.label].append(cell)
    for (task, label), found in lacking.items():
        told = subprocess.run(
            [sys.executable, __file__, comparison, task, label], stdout=subprocess.PIPE, text=True, check=True
        )
        foreseen = json.loads(told.stdout.splitlines()[-1])
        print(f"{task}: {label}: {len(found)} runs: {foreseen}", flush=True)
        for cell in found:
            path = cells.folder(cell) / RESULT
            path.write_text(json.dumps(json.loads(path.read_text()) | foreseen), encoding="utf-8")


def foresee(comparison: str, task: str, label: str) -> dict[str, float | None]:
    """Of one run, as it would be told before its first step."""
    from metier.data.records import load_records
    from metier.evaluation.tasks import load_task
    from metier.models.load import ignore_renamed_options
    from metier.models.skeleton import model_config
    from metier.training.foresight import Foresight
    from metier.training.run import encode_for, load_base

    ignore_renamed_options()
    config = load_comparison(comparison)
    candidate = Cells(config).candidate(Cell(task=task, label=label))
    with tempfile.TemporaryDirectory() as folder:
        records = str(load_task(task).splits["train"])
        run = config.run_config(candidate, records, candidate.learning_rate, config.seeds[0], Path(folder))
        foresight = Foresight(run, model_config(run.model), force=True)
        loaded = load_base(run)
        items = encode_for(loaded, load_records(run.dataset), run)
        found = foresight.before_training(items.items, None)
    return {name: found.get(key) for key, name in NAMES.items()}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        print(json.dumps(foresee(*sys.argv[1:])))
