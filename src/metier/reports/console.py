"""The comparison as a table for the console: what `metier demo` prints at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from metier.evaluation.compare import ComparisonRow
from metier.reports import units
from metier.reports.data import method_title


def comparison_table(
    rows: Sequence[ComparisonRow], *, title: str | None = None, total_parameters: int | None = None
) -> Table:
    """A rich table of the comparison, a column a method; what was measured for none of them is left out.

    Args:
        rows: from `metier.evaluation.compare`.
        title: above the table.
        total_parameters: of the model, to show trained parameters as a share of it.
    """
    metric = next((row.score.metric for row in rows if row.score is not None), "score")
    measures: list[tuple[str, list[str | None]]] = [
        (metric, [_score(row) for row in rows]),
        ("gain", [units.signed(row.gain.value, digits=1) if row.gain else None for row in rows]),
        ("of full fine-tuning's", [_given(row.gain_share, units.share) for row in rows]),
        ("forgetting, bits/byte", [_forgetting(row) for row in rows]),
        ("cloze", [units.number(row.cloze.accuracy, digits=1) if row.cloze else None for row in rows]),
        ("trained", [_trained(row, total_parameters) for row in rows]),
        ("stored", [_given(row.delta_bytes, units.size) for row in rows]),
        ("training", [_given(row.train_seconds, units.duration) for row in rows]),
        ("peak memory", [_given(row.peak_memory_bytes, units.size) for row in rows]),
    ]
    table = Table(title=None if title is None else Text(title), caption="± is half of the 95% interval")
    # methods side by side: there are few of them, so the table fits a terminal of 80 columns
    table.add_column("")
    best = next((index for index, row in enumerate(rows) if not row.is_base), None)
    for index, row in enumerate(rows):
        # Text, not str: a name is no console markup
        table.add_column(
            Text(method_title(row.name)), justify="right", style="bold" if index == best else "", overflow="fold"
        )
    for name, cells in measures:
        if any(cell is not None for cell in cells):
            table.add_row(name, *(Text(cell or units.MISSING) for cell in cells))
    return table


def _score(row: ComparisonRow) -> str | None:
    if row.score is None:
        return None
    return f"{units.number(row.score.value, digits=1)} ±{(row.score.high - row.score.low) / 2:.1f}"


def _forgetting(row: ComparisonRow) -> str | None:
    if row.forgetting is None:
        return None
    half = (row.forgetting.high - row.forgetting.low) / 2
    return f"{units.signed(row.forgetting.value, digits=3)} ±{half:.3f}"


def _trained(row: ComparisonRow, total_parameters: int | None) -> str | None:
    if row.trainable_parameters is None:
        return None
    part = f" ({units.share(row.trainable_parameters / total_parameters, digits=1)})" if total_parameters else ""
    return units.count(row.trainable_parameters) + part


def _given(value: float | None, write: Callable[[float], str]) -> str | None:
    return None if value is None else write(value)
