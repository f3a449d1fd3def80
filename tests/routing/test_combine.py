"""Union and intersection of selections: the laws of sets, layer by layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import SelectionError
from metier.routing.selection import ExpertSelection, intersection_selection, union_selection

# numbers that a set of Python's does not keep in order by itself
IDS = st.lists(st.sampled_from([0, 1, 8, 9, 16, 33, 57, 63]), min_size=1, max_size=8, unique=True).map(tuple)
# layer 0 always shares expert 0, so that intersections are never empty
SELECTIONS = st.builds(
    lambda experts, first, shared: ExpertSelection(
        experts={**experts, 0: tuple(dict.fromkeys((0, *first)))}, shared_experts=shared, num_experts=64
    ),
    st.dictionaries(st.integers(1, 4), IDS, max_size=4),
    IDS,
    st.booleans(),
)


def pairs(selection: ExpertSelection) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, ids in selection.experts.items() for expert in ids}


@given(first=SELECTIONS, second=SELECTIONS)
def test_they_are_union_and_intersection_of_sets(first: ExpertSelection, second: ExpertSelection) -> None:
    union, common = union_selection([first, second]), intersection_selection([first, second])
    assert pairs(union) == pairs(first) | pairs(second)
    assert pairs(common) == pairs(first) & pairs(second)
    assert union.num_selected + common.num_selected == first.num_selected + second.num_selected
    assert union.shared_experts == (first.shared_experts or second.shared_experts)
    assert common.shared_experts == (first.shared_experts and second.shared_experts)
    for result in (union, common):
        assert list(result.experts) == sorted(result.experts)
        assert all(list(ids) == sorted(ids) for ids in result.experts.values())
        assert result.num_experts == 64


@given(first=SELECTIONS, second=SELECTIONS, third=SELECTIONS)
def test_order_grouping_and_repetition_do_not_matter(
    first: ExpertSelection, second: ExpertSelection, third: ExpertSelection
) -> None:
    for combined in (union_selection, intersection_selection):
        whole = combined([first, second, third])
        assert list(combined([third, first, second]).experts.items()) == list(whole.experts.items())
        assert combined([combined([first, second]), third]) == whole
        assert combined([whole, whole]) == whole
    assert intersection_selection([first, union_selection([first, second])]) == union_selection([first])
    assert union_selection([first, intersection_selection([first, second])]) == union_selection([first])


def test_a_layer_without_a_common_expert_is_left_out() -> None:
    first, second = ExpertSelection(experts={1: (3, 1), 2: (5,)}), ExpertSelection(experts={1: (1,), 2: (4,)})
    assert intersection_selection([first, second]).experts == {1: (1,)}
    assert union_selection([first, second]).experts == {1: (1, 3), 2: (4, 5)}


def test_nothing_in_common_is_an_error() -> None:
    first, second = ExpertSelection(experts={1: (3,)}), ExpertSelection(experts={1: (4,)}, non_expert_modules=True)
    with pytest.raises(
        SelectionError, match=r"(?s)intersection: the 2 selections have no expert in common.*or take the"
    ):
        intersection_selection([first, second])


def test_other_modules_in_common_are_a_selection() -> None:
    first, second = (ExpertSelection(experts={1: (e,)}, non_expert_modules=True) for e in (3, 4))
    common = intersection_selection([first, second])
    assert (common.experts, common.shared_experts, common.non_expert_modules) == ({}, False, True)


def test_other_modules_of_one_are_in_the_union() -> None:
    first, second = ExpertSelection(experts={1: (3,)}), ExpertSelection(experts={1: (4,)}, non_expert_modules=True)
    assert union_selection([first, second]).non_expert_modules


def test_a_number_of_experts_that_is_unknown_in_one_is_taken_from_the_other() -> None:
    read, made = ExpertSelection(experts={1: (3,)}), ExpertSelection(experts={1: (3,)}, num_experts=8)
    assert union_selection([read, made]).num_experts == intersection_selection([read, made]).num_experts == 8
    assert union_selection([read]).num_experts is None


@pytest.mark.parametrize("combined", [union_selection, intersection_selection])
def test_what_cannot_be_combined_is_an_error(combined: type) -> None:
    with pytest.raises(SelectionError, match="selections: got none, expected at least one"):
        combined([])
    with pytest.raises(SelectionError, match="num_experts: got selections of models with 8 and 64 experts a layer"):
        combined([ExpertSelection(experts={1: (3,)}, num_experts=n) for n in (64, 8)])
