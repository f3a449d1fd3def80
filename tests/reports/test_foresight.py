"""What was foreseen stands beside what was measured, with its error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from html_page import Page
from metier.reports.data import ReportData
from metier.reports.html import render

PLAN: dict[str, Any] = {
    "predicted": {"peak_memory_bytes": 1.1e9, "step_seconds": 1.5, "train_seconds": 30.0, "bottleneck": "products"},
    "measured": {"peak_memory_bytes": 1.0e9, "step_seconds": 2.0, "train_seconds": 40.0},
}


def words(run: ReportData, plan: dict[str, Any] | None) -> str:
    plans = {} if plan is None else {"esft": plan}
    return Page(render(dataclasses.replace(run, plans=plans))).words


def test_each_prediction_has_its_error(run: ReportData) -> None:
    shown = words(run, PLAN)
    assert "ESFT: peak memory 1.1 GB 1.0 GB +10.0%" in shown
    assert "ESFT: a step 1.5 s 2.0 s \u221225.0%" in shown
    assert "ESFT: all steps 30.0 s 40.0 s \u221225.0%" in shown
    assert "ESFT spends most of a step on products." in shown


@pytest.mark.parametrize(
    "plan",
    [
        {"predicted": {"not_traced": "three stacks"}, "measured": {"peak_memory_bytes": 1e9, "step_seconds": None}},
        {"predicted": {"step_seconds": 1.0, "bottleneck": "products"}, "measured": None},
    ],
)
def test_where_one_side_is_missing_there_is_no_row(run: ReportData, plan: dict[str, Any]) -> None:
    shown = words(run, plan)
    assert "Nothing of this run was foreseen" in shown
    assert "ESFT: a step" not in shown


def test_a_report_without_a_run_has_no_such_part(run: ReportData) -> None:
    assert "Foreseen" not in words(run, None)
