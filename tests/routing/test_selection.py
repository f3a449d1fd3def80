"""Selections: chosen from a profile, checked against a model, drawn at random, kept in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metier.errors import SelectionError, UnsupportedModelError
from metier.models.moe import moe_layers
from metier.routing.profile import RoutingProfile, UnreliableProfileWarning
from metier.routing.selection import ExpertSelection, SelectionConfig, random_selection, select
from tiny_models import tiny_model


def made_profile(even: list[int], odd: list[int]) -> RoutingProfile:
    """One layer, number 3, of four experts; the gate mass runs against the counts."""
    counts_HLE = torch.tensor([[even], [odd]])
    return RoutingProfile(
        layer_ids=(3,),
        num_experts=4,
        top_k=1,
        token_counts_HLE=counts_HLE,
        gate_mass_HLE=100.0 - counts_HLE.double(),
        num_tokens_H=(sum(even), sum(odd)),
    )


def test_select_uses_the_score_that_is_asked_for() -> None:
    profile = made_profile([70, 20, 9, 1], [70, 20, 9, 1])
    assert select(profile, SelectionConfig(score="token", top_p=0.8)).experts == {3: (0, 1)}
    assert select(profile, SelectionConfig(score="gate", top_p=0.5)).experts == {3: (3, 2)}


def test_select_remembers_the_number_of_experts() -> None:
    selection = select(made_profile([70, 20, 9, 1], [70, 20, 9, 1]), SelectionConfig(score="token", top_p=0.8))
    assert selection.num_experts == 4
    assert selection.num_selected == 2
    assert (selection.shared_experts, selection.non_expert_modules) == (False, False)


def test_select_warns_where_the_halves_disagree() -> None:
    with pytest.warns(UnreliableProfileWarning, match=r"(?s)token scores and top_p=0\.5 \(Jaccard 0\.33, expected"):
        select(made_profile([45, 40, 15, 0], [45, 0, 15, 40]), SelectionConfig(score="token", top_p=0.5))


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


def test_a_random_selection_has_the_same_counts_and_other_experts() -> None:
    like = ExpertSelection(experts={4: (0, 1, 2), 1: (0, 1), 2: (0,)}, shared_experts=True)
    drawn = random_selection(like, num_experts=64, seed=0)
    assert {layer: len(ids) for layer, ids in drawn.experts.items()} == {4: 3, 1: 2, 2: 1}
    assert drawn.shared_experts
    assert drawn.num_experts == 64
    assert drawn.experts != like.experts
    assert random_selection(like, num_experts=64, seed=0) == drawn
    assert random_selection(like, num_experts=64, seed=1) != drawn
    reordered = ExpertSelection(experts={1: (0, 1), 2: (0,), 4: (0, 1, 2)}, shared_experts=True)
    assert random_selection(reordered, num_experts=64, seed=0) == drawn


def test_a_random_selection_from_too_few_experts_is_an_error() -> None:
    with pytest.raises(SelectionError, match="got 3 experts to pick, but there are only num_experts=2"):
        random_selection(ExpertSelection(experts={4: (0, 1, 2)}), num_experts=2, seed=0)
