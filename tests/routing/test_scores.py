"""The two scores and the paper's raw gate scale."""

from __future__ import annotations

import pytest
import torch

from metier.errors import SelectionError
from metier.routing.scores import gate_score_LE, raw_gate_score_LE, token_ratio_LE


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
