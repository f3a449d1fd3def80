"""The scores and the paper's raw gate scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import SelectionError
from metier.routing.scores import (
    gate_score_LE,
    output_norm_score_LE,
    positive_share_LE,
    raw_gate_score_LE,
    raw_output_norm_LE,
    token_ratio_LE,
)


def test_rows_sum_to_one_over_experts_not_over_layers() -> None:
    counts_LE = torch.tensor([[1, 3, 0], [2, 2, 4]])
    assert token_ratio_LE(counts_LE).tolist() == [[0.25, 0.75, 0], [0.25, 0.25, 0.5]]
    torch.testing.assert_close(gate_score_LE(counts_LE.double() * 0.1), token_ratio_LE(counts_LE))


def test_a_constant_scaling_factor_cancels_in_the_score_but_not_on_the_raw_scale() -> None:
    mass_LE = torch.rand(3, 5, dtype=torch.float64)
    torch.testing.assert_close(gate_score_LE(mass_LE * 16), gate_score_LE(mass_LE))
    torch.testing.assert_close(raw_gate_score_LE(mass_LE * 16, num_tokens=7), mass_LE * 16 / 7)


def test_a_layer_that_saw_nothing_has_no_scores() -> None:
    with pytest.raises(SelectionError, match="row 1: this layer counted no token at all"):
        token_ratio_LE(torch.tensor([[1, 0], [0, 0]]))


def test_no_tokens_have_no_raw_gate_scores() -> None:
    with pytest.raises(SelectionError, match="num_tokens: got 0, expected at least 1"):
        raw_gate_score_LE(torch.ones(1, 2), num_tokens=0)


def test_output_norms_are_normalised_or_a_mean_a_token() -> None:
    norm_LE = torch.tensor([[1.0, 3.0], [0.0, 5.0]], dtype=torch.float64)
    assert output_norm_score_LE(norm_LE).tolist() == [[0.25, 0.75], [0, 1]]
    assert raw_output_norm_LE(norm_LE, num_tokens=4).tolist() == [[0.25, 0.75], [0, 1.25]]
    with pytest.raises(SelectionError, match="num_tokens: got 0, expected at least 1"):
        raw_output_norm_LE(norm_LE, num_tokens=0)


def test_negative_differences_share_nothing() -> None:
    difference_LE = torch.tensor([[0.3, -0.4, 0.1], [-0.2, 0.2, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        positive_share_LE(difference_LE), torch.tensor([[0.75, 0, 0.25], [0, 1, 0]], dtype=torch.float64)
    )


@given(values=st.lists(st.integers(-50, 50), min_size=2, max_size=12).filter(lambda values: max(values) > 0))
def test_shares_of_differences_keep_the_order_and_sum_to_one(values: list[int]) -> None:
    share_E = positive_share_LE(torch.tensor([values], dtype=torch.float64))[0]
    assert share_E.sum().item() == pytest.approx(1)
    assert all((share > 0) == (value > 0) for share, value in zip(share_E.tolist(), values, strict=True))
    order = sorted(range(len(values)), key=lambda e: values[e])
    assert share_E[order].tolist() == sorted(share_E.tolist())


def test_a_layer_without_a_positive_difference_has_no_share() -> None:
    with pytest.raises(
        SelectionError, match=r"(?s)row 1: no expert of this layer scores higher on the task.*differ from"
    ):
        positive_share_LE(torch.tensor([[0.1, -0.1], [0.0, 0.0]], dtype=torch.float64))
