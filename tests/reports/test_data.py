"""Data that contradict themselves are refused before a page is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from metier.errors import ConfigError
from metier.reports.data import ReportData, method_title


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scores_LE": [[0.5, 0.5], [1.0]]}, r"rows of one length, got lengths \[1, 2\]"),
        ({"scores_LE": []}, r"rows of one length, got lengths \[\]"),
        ({"scores_LE": [[], []]}, r"rows of one length, got lengths \[0\]"),
        ({"layer_ids": [1]}, "got 2 rows of scores and 1 layer_ids"),
        ({"layer_ids": None}, "got 2 rows of scores and none layer_ids"),
        ({"selected": {2: [0]}}, "layer 2 of the selection has no scores; scores are of layers 1, 3"),
        ({"selected": {1: [0, 5]}}, "layer 1 of the selection names expert 5, but scores have 5 experts"),
        ({"selected": {3: [-1]}}, "layer 3 of the selection names expert -1"),
    ],
)
def test_contradictions_are_refused(changed: Callable[..., ReportData], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(**fields)


def test_an_unknown_method_keeps_its_name() -> None:
    assert (method_title("esft"), method_title("mine")) == ("ESFT", "mine")
