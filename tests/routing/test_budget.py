"""One budget of bytes for all layers, against a slow reference, and what always holds of it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import SelectionError
from metier.routing.budget import pick_within_budget

Table = tuple[dict[int, list[int]], dict[int, int]]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Whole-number scores (so that ties happen and ratios are exact) and sizes, by layer."""
    layers = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    num_experts = draw(st.integers(1, 6))
    row = st.lists(st.integers(-3, 8), min_size=num_experts, max_size=num_experts)
    return {layer: draw(row) for layer in layers}, {layer: draw(st.integers(1, 5)) for layer in layers}


def spent_bytes(picked: dict[int, tuple[int, ...]], sizes: dict[int, int]) -> int:
    return sum(len(experts) * sizes[layer] for layer, experts in picked.items())


def one_by_one(scores: dict[int, list[int]], sizes: dict[int, int], budget_bytes: int) -> dict[int, set[int]]:
    """Look over everything for the best expert that is left, again and again."""
    picked: dict[int, set[int]] = {}
    while True:
        best = None
        for layer in sorted(scores):
            for expert, score in enumerate(scores[layer]):
                ratio = Fraction(score, sizes[layer])
                if expert not in picked.get(layer, ()) and score > 0 and (best is None or ratio > best[0]):
                    best = (ratio, layer, expert)
        if best is None or sizes[best[1]] > budget_bytes:
            return picked
        budget_bytes -= sizes[best[1]]
        picked.setdefault(best[1], set()).add(best[2])


@given(table=tables(), budget_bytes=st.integers(1, 60))
def test_it_is_what_picking_one_by_one_gives(table: Table, budget_bytes: int) -> None:
    scores, sizes = table
    picked = pick_within_budget(scores, expert_bytes=sizes, budget_bytes=budget_bytes)
    assert {layer: set(experts) for layer, experts in picked.items()} == one_by_one(scores, sizes, budget_bytes)
    assert spent_bytes(picked, sizes) <= budget_bytes
    assert list(picked) == sorted(picked)
    for layer, experts in picked.items():
        assert len(set(experts)) == len(experts) > 0
        assert [(-scores[layer][e], e) for e in experts] == sorted((-scores[layer][e], e) for e in experts)
        assert min(scores[layer][e] for e in experts) > 0


@given(table=tables(), budget_bytes=st.integers(1, 60), more_bytes=st.integers(0, 30))
def test_a_larger_budget_only_adds(table: Table, budget_bytes: int, more_bytes: int) -> None:
    scores, sizes = table
    small = pick_within_budget(scores, expert_bytes=sizes, budget_bytes=budget_bytes)
    large = pick_within_budget(scores, expert_bytes=sizes, budget_bytes=budget_bytes + more_bytes)
    assert all(set(experts) <= set(large.get(layer, ())) for layer, experts in small.items())


@given(table=tables(), budget_bytes=st.integers(1, 60))
def test_less_than_one_expert_is_left_over(table: Table, budget_bytes: int) -> None:
    scores, sizes = table
    picked = pick_within_budget(scores, expert_bytes=sizes, budget_bytes=budget_bytes)
    wanted = sum(score > 0 for row in scores.values() for score in row)
    if sum(map(len, picked.values())) < wanted:
        assert budget_bytes - spent_bytes(picked, sizes) < max(sizes.values())


@given(table=tables(), budget_bytes=st.integers(1, 60))
def test_the_order_of_the_layers_does_not_show(table: Table, budget_bytes: int) -> None:
    scores, sizes = table
    turned = {layer: scores[layer] for layer in reversed(scores)}
    assert list(pick_within_budget(turned, expert_bytes=sizes, budget_bytes=budget_bytes).items()) == list(
        pick_within_budget(scores, expert_bytes=sizes, budget_bytes=budget_bytes).items()
    )


def test_layers_compete_by_score_a_byte() -> None:
    scores = {0: [0.5, 0.5], 1: [0.9, 0.1]}
    assert pick_within_budget(scores, expert_bytes={0: 10, 1: 10}, budget_bytes=20) == {0: (0,), 1: (0,)}
    assert pick_within_budget(scores, expert_bytes={0: 5, 1: 10}, budget_bytes=14) == {0: (0, 1)}


def test_the_list_ends_at_the_first_that_does_not_fit() -> None:
    scores = {0: [1.0], 1: [0.1]}
    assert pick_within_budget(scores, expert_bytes={0: 10, 1: 2}, budget_bytes=9) == {}


@pytest.mark.parametrize(
    ("scores", "sizes", "message"),
    [
        (
            {0: [1.0]},
            {0: 1, 1: 1},
            r"(?s)expert_bytes: got layers \[0, 1\], expected \[0\] as in the profile.*one model",
        ),
        ({0: [1.0], 1: [1.0]}, {0: 1}, r"expert_bytes: got layers \[0\], expected \[0, 1\]"),
        ({0: [1.0]}, {0: 0}, r"layers\.0: got 0 bytes an expert, expected at least 1"),
        ({0: [1.0, math.nan]}, {0: 1}, r"layers\.0: got a score that is not a finite number"),
    ],
)
def test_what_does_not_fit_together_is_an_error(
    scores: dict[int, list[float]], sizes: dict[int, int], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        pick_within_budget(scores, expert_bytes=sizes, budget_bytes=10)
