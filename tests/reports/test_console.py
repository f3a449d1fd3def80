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


def test_each_method_is_a_line_with_its_figures(run: ReportData) -> None:
    text = printed(comparison_table(run.rows, title="[greek]", total_parameters=10**7))
    lines = {name: line for line in text.splitlines() for name in ("Base model", "ESFT", "Full") if name in line}
    assert len(lines) == 3
    assert "[greek]" in text
    for expected in ("250.0 K (2.5%)", "500.0 KB", "30.0 s", "1.0 GB", "+0.075 ±0.000", "48.0"):
        assert expected in lines["ESFT"]
    assert "100%" in lines["Full"]
    assert lines["Base model"].count("–") == 7


def test_columns_without_any_value_are_left_out(run: ReportData) -> None:
    rows = [dataclasses.replace(row, cloze=None, peak_memory_bytes=None) for row in run.rows]
    text = printed(comparison_table(rows))
    assert "cloze" not in text
    assert "peak memory" not in text
    assert "stored" in text


def test_a_name_is_no_console_markup(run: ReportData) -> None:
    rows = [dataclasses.replace(run.rows[0], name="[red]x[/red]")]
    assert "[red]x[/red]" in printed(comparison_table(rows))
