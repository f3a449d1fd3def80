"""What lm-evaluation-harness found, as a table for the console."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from metier.evaluation.harness import HarnessResult
from metier.reports import units


def harness_table(result: HarnessResult) -> Table:
    """A rich table, a line a metric, in the harness's own unit."""
    packages = f"lm_eval {result.versions['lm_eval']}, metier {result.versions['metier']}"
    adapters = ", ".join(f"{name} ({kind})" for name, kind in result.adapters.items())
    on = f"base {result.fingerprint[:12]}" + (f" with {adapters}" if adapters else "")
    # without lines between columns it fits a terminal of 80
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=Text(f"{packages}; {on}; ± is the standard error"))
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for column in ("score", "items", "shots", "version"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in result.scores:
        value = f"{score.value:.4f}" + ("" if score.stderr is None else f" ±{score.stderr:.4f}")
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        cells = (score.task, metric, value, score.num_items, score.num_fewshot, score.version)
        # Text, not str: a name is no console markup
        table.add_row(*(Text(units.MISSING if cell is None else str(cell)) for cell in cells))
    return table
