"""Which runs a comparison needs, and how one decides about the next."""

from __future__ import annotations

from dataclasses import replace

from metier.evaluation.comparison.cells import FAILURE, Cell, Cells, forget_failures
from metier.evaluation.comparison.config import BASE, FULL


def test_the_sweep_comes_first_then_the_best_rate_with_other_seeds(comparison, write) -> None:
    cells = Cells(comparison())
    assert [cell.label for cell in cells.pending()] == [BASE, *[FULL] * 3, *["ESFT"] * 3, *["LoRA"] * 3]
    assert cells.num_needed() == 1 + 3 * (3 + 2)
    for cell in cells.pending():
        # ESFT is best at its highest rate; LoRA's rates are all alike, so that the lowest counts
        score = cell.learning_rate if cell.label == "ESFT" else 1.0
        write(cells, cell, score)
    cells = Cells(comparison())
    esft, lora = cells.config.candidates[1:]
    assert cells.best_rate("synopsis", esft) == 3e-3
    assert cells.best_rate("synopsis", lora) == cells.rates(lora)[0]
    assert {(cell.label, cell.seed) for cell in cells.pending()} == {
        (label, seed) for label in (FULL, "ESFT", "LoRA") for seed in (1, 2)
    }


def test_the_best_rate_is_by_validation_and_not_by_test(comparison, write) -> None:
    cells = Cells(comparison())
    esft = cells.config.candidates[1]
    for rate in cells.rates(esft):
        write(cells, Cell(task="synopsis", label="ESFT", learning_rate=rate), rate, validation=-rate)
    assert cells.best_rate("synopsis", esft) == min(cells.rates(esft))


def test_a_failed_run_counts_as_tried_and_may_be_tried_again(comparison, write) -> None:
    cells = Cells(comparison())
    first, *others = (
        Cell(task="synopsis", label="ESFT", learning_rate=r) for r in cells.rates(cells.config.candidates[1])
    )
    for cell in others:
        write(cells, cell, 1.0)
    folder = cells.folder(first)
    folder.mkdir(parents=True)
    (folder / FAILURE).write_text("killed\n")
    assert cells.failed() == [first]
    assert cells.best_rate("synopsis", cells.config.candidates[1]) == others[0].learning_rate
    forget_failures(cells, cells.failed())
    assert first in cells.pending()


def test_another_setting_is_another_run_and_another_folder_is_not(comparison, write) -> None:
    cells = Cells(comparison())
    cell = cells.pending()[4]
    write(cells, cell, 1.0)
    assert Cells(comparison()).result(cell) is not None
    assert Cells(comparison(run={"max_steps": 5})).result(cell) is None
    assert Cells(comparison(seeds=(0, 5))).result(cell) is not None
    changed = replace(comparison().candidates[1], run={"top_p": 0.1})
    assert Cells(comparison(candidates=(changed,))).result(cell) is None
