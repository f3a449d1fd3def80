"""Selections: checked by themselves and against a model, kept in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.errors import SelectionError, UnsupportedModelError
from metier.models.moe import moe_layers
from metier.routing.selection import ExpertSelection
from tiny_models import tiny_model


def test_a_selection_is_written_and_read(tmp_path: Path) -> None:
    selection = ExpertSelection(experts={7: (5, 1), 2: (0,)}, shared_experts=True, num_experts=8)
    selection.save(tmp_path / "selection.json")
    loaded = ExpertSelection.load(str(tmp_path / "selection.json"))
    assert loaded == selection
    assert loaded.num_experts is None
    assert list(loaded.experts.items()) == [(7, (5, 1)), (2, (0,))]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({}, "the selection is empty"),
        ({7: ()}, r"layers\.7: got no expert id, expected at least one"),
        ({7: (1, -2)}, r"layers\.7: got expert -2, expected ids from 0 on"),
        ({7: (1, 2, 1)}, r"layers\.7: got expert 1 twice in \[1, 2, 1\]"),
        ({7: (1, 8)}, r"layers\.7: selection names expert 8, but model has num_experts=8 \(ids 0 to 7\)"),
    ],
)
def test_a_selection_that_makes_no_sense_is_an_error(experts: dict[int, tuple[int, ...]], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        ExpertSelection(experts=experts, num_experts=8)


def test_a_file_that_makes_no_sense_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    path.write_text('{"experts": {"7": [1, 1]}, "shared_experts": false, "non_expert_modules": false}')
    with pytest.raises(SelectionError, match=r"selection\.json: layers\.7: got expert 1 twice"):
        ExpertSelection.load(path)


def test_flags_alone_are_a_selection() -> None:
    assert ExpertSelection(experts={}, shared_experts=True).num_selected == 0


def test_a_selection_that_fits_is_valid_for_model_and_layers() -> None:
    model = tiny_model("deepseek_v2")
    selection = ExpertSelection(experts={1: (0, 7), 2: (3,)}, shared_experts=True)
    selection.validate(model)
    selection.validate(moe_layers(model))


def test_an_expert_that_does_not_exist_is_an_error() -> None:
    message = (
        r"(?s)layers\.2: selection names expert 71, but model has num_experts=8 \(ids 0 to 7\)\."
        r".*made for another model; select again"
    )
    with pytest.raises(SelectionError, match=message):
        ExpertSelection(experts={1: (7,), 2: (3, 71)}).validate(tiny_model("deepseek_v2"))


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_has_no_experts_is_an_error(layer: int) -> None:
    message = rf"layers\.{layer}: the selection names experts \[4\], but the model has no MoE layer there; its MoE "
    with pytest.raises(SelectionError, match=message + r"layers are 1-2\."):
        ExpertSelection(experts={layer: (4,)}).validate(tiny_model("deepseek_v2"))


def test_shared_experts_of_a_model_without_any_are_an_error() -> None:
    with pytest.raises(SelectionError, match="shared_experts: got true, but the model has no shared expert"):
        ExpertSelection(experts={1: (4,)}, shared_experts=True).validate(tiny_model("olmoe"))


def test_a_dense_model_has_nothing_to_select() -> None:
    with pytest.raises(UnsupportedModelError, match="has no MoE layer"):
        ExpertSelection(experts={1: (4,)}).validate(tiny_model("llama"))
