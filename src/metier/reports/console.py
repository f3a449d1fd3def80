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
    """A rich table of the comparison; columns that no row has a value for are left out.

    Args:
        rows: from `metier.evaluation.compare`.
        title: above the table.
        total_parameters: of the model, to show trained parameters as a share of it.
    """
    table = Table(title=None if title is None else Text(title), caption="± is half of the 95% interval")
    columns: list[tuple[str, list[str | None]]] = [("method", [method_title(row.name) for row in rows])]
    metric = next((row.score.metric for row in rows if row.score is not None), "score")
    columns.append((metric, [_score(row) for row in rows]))
    columns.append(("gain", [units.signed(row.gain.value, digits=1) if row.gain else None for row in rows]))
    columns.append(("of full", [_given(row.gain_share, units.share) for row in rows]))
    columns.append(("forgetting\nbits/byte", [_forgetting(row) for row in rows]))
    columns.append(("cloze", [units.number(row.cloze.accuracy, digits=1) if row.cloze else None for row in rows]))
    columns.append(("trained", [_trained(row, total_parameters) for row in rows]))
    columns.append(("stored", [_given(row.delta_bytes, units.size) for row in rows]))
    columns.append(("training", [_given(row.train_seconds, units.duration) for row in rows]))
    columns.append(("peak memory", [_given(row.peak_memory_bytes, units.size) for row in rows]))
    kept = [(name, cells) for name, cells in columns if any(cell is not None for cell in cells)]
    for index, (name, _) in enumerate(kept):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    best = next((index for index, row in enumerate(rows) if not row.is_base), None)
    for index in range(len(rows)):
        # Text, not str: a name is no console markup.
        cells = (Text(cells[index] or units.MISSING) for _, cells in kept)
        table.add_row(*cells, style="bold" if index == best else None)
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
