"""The rows: gains over the base, ties, edges, forgetting, and what is left out while it is not there."""

from __future__ import annotations

import json

import numpy as np

from metier.evaluation.comparison.cells import RESULT, Cell, Cells
from metier.evaluation.comparison.config import BASE, FULL
from metier.evaluation.comparison.results import over_tasks, rows_of


def filled(comparison, write, **scores: float) -> Cells:
    cells = Cells(comparison())
    while pending := cells.pending():
        for cell in pending:
            score = {BASE: 10.0, FULL: 20.0, **scores}[cell.label]
            # a hill with its top at the candidate's own rate
            own = next((c.learning_rate for c in cells.config.candidates if c.label == cell.label), 0.0)
            at_top = cell.learning_rate == own
            write(
                cells,
                cell,
                score if at_top else score - 5,
                bits_per_byte={"prose": 1.0 + (not cell.is_base) * 0.1, "python": 2.0},
            )
        cells = Cells(comparison())
    return cells


def test_rows_have_gain_share_forgetting_and_costs(comparison, write) -> None:
    rows = {row.label: row for row in rows_of(filled(comparison, write, ESFT=19.0, LoRA=15.0), "synopsis")}
    assert list(rows) == [BASE, FULL, "ESFT", "LoRA"]
    assert rows["ESFT"].gain == 9
    assert rows["ESFT"].gain_share == 0.9
    assert rows[BASE].gain_share is None
    assert np.isclose(rows["ESFT"].forgetting.value, 0.05)
    assert rows["ESFT"].learning_rate == rows["ESFT"].default_rate
    assert not rows["ESFT"].is_at_edge
    assert rows["ESFT"].num_seeds == 3
    assert rows["ESFT"].costs["delta_bytes"] == 4000
    assert [row.label for row in rows.values() if row.is_tied_with_best] == [FULL]


def test_a_tie_is_one(comparison, write) -> None:
    rows = {row.label: row for row in rows_of(filled(comparison, write, ESFT=20.0, LoRA=15.0), "synopsis")}
    assert rows["ESFT"].is_tied_with_best
    assert rows[FULL].is_tied_with_best
    assert not rows["LoRA"].is_tied_with_best


def test_the_best_rate_at_the_end_of_those_tried_is_marked(comparison, write) -> None:
    cells = Cells(comparison())
    write(cells, Cell(task="synopsis", label=BASE), 10.0)
    for rate in cells.rates(cells.config.candidates[1]):
        write(cells, Cell(task="synopsis", label="ESFT", learning_rate=rate), 1000 * rate)
    rows = rows_of(cells, "synopsis")
    assert [row.label for row in rows] == [BASE, "ESFT"]
    assert rows[1].is_at_edge
    assert rows[1].num_seeds == 1
    assert rows[1].gain_share is None
    assert rows[1].default_score == 1.0
    assert rows[1].score.value == 3.0


def test_nothing_is_said_without_the_base(comparison) -> None:
    assert rows_of(Cells(comparison()), "synopsis") == []


def test_tasks_are_averaged_where_all_are_there(comparison, write) -> None:
    rows = rows_of(filled(comparison, write, ESFT=19.0, LoRA=15.0), "synopsis")
    found = {row["label"]: row for row in over_tasks({"a": rows, "b": rows[:-1]})}
    assert set(found) == {FULL, "ESFT"}
    assert found["ESFT"]["gain_share"] == 0.9
    assert found[FULL]["num_ties_with_best"] == 2


def test_seconds_are_those_of_one_machine(comparison, write) -> None:
    cells = filled(comparison, write, ESFT=19.0, LoRA=15.0)
    for cell in cells.known():
        # ESFT ran on both, LoRA on the slow one alone
        is_slow = cell.label == "LoRA" or (cell.label == "ESFT" and cell.seed == 1)
        machine = {"cpu": "slow" if is_slow else "fast", "threads": 2, "platform": f"kernel {cell.seed}"}
        changes = {"hardware": machine, "step_seconds": 9.0 if is_slow else 1.5}
        path = cells.folder(cell) / RESULT
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    rows = {row.label: row for row in rows_of(Cells(cells.config), "synopsis")}
    assert rows["ESFT"].timed_on == "fast, 2 threads"
    assert rows["ESFT"].costs["step_seconds"] == 1.5
    assert rows["LoRA"].costs["step_seconds"] is None
    assert rows["LoRA"].costs["delta_bytes"] == 4000
    assert rows["ESFT"].num_seeds == 3


def test_where_the_base_leads_nothing_below_it_is_tied_with_it(comparison, write) -> None:
    rows = rows_of(filled(comparison, write, **{BASE: 50.0, FULL: 5.0, "ESFT": 5.0, "LoRA": 5.0}), "synopsis")
    assert [row.label for row in rows if row.is_tied_with_best] == [BASE]
