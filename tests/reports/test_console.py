"""The console's table: all methods, no empty columns, names as text."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from metier.reports.console import comparison_table
from metier.reports.data import ReportData


def printed(table: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_each_method_is_a_column_with_its_figures(run: ReportData) -> None:
    text = printed(comparison_table(run.rows, title="[greek]", total_parameters=10**7))
    assert "[greek]" in text
    head = next(line for line in text.splitlines() if "Base model" in line)
    titles = [cell.strip() for cell in head.strip("┃").split("┃")]
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    columns = {title: [row[index] for row in cells] for index, title in enumerate(titles)}
    for expected in ("250.0 K (2.5%)", "500.0 KB", "30.0 s", "1.0 GB", "+0.075 ±0.000", "48.0"):
        assert any(expected in cell for cell in columns["ESFT"]), expected
    assert "100%" in columns["Full fine-tuning"]
    assert columns["Base model"].count("–") == 7


def test_the_table_fits_a_terminal_of_80_columns(run: ReportData) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_table(run.rows, total_parameters=10**7))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_lines_without_any_value_are_left_out(run: ReportData) -> None:
    rows = [dataclasses.replace(row, cloze=None, peak_memory_bytes=None) for row in run.rows]
    text = printed(comparison_table(rows))
    assert "cloze" not in text
    assert "peak memory" not in text
    assert "stored" in text


def test_a_name_is_no_console_markup(run: ReportData) -> None:
    rows = [dataclasses.replace(run.rows[0], name="[red]x[/red]")]
    assert "[red]x[/red]" in printed(comparison_table(rows))
