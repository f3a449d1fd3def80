"""What a configuration of a selection may say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from metier.errors import ConfigError
from metier.routing.selection_config import SelectionConfig


def test_the_usual_configuration_is_as_it_was() -> None:
    config = SelectionConfig(score="token", top_p=0.2)
    assert (config.top_k, config.top_fraction, config.budget_bytes) == (None, None, None)
    assert (config.scale, config.minus_general) == ("normalised", False)
    assert config == SelectionConfig(score="token", top_p=0.2)
    assert (config.score_name, config.policy_name) == ("token scores", "top_p=0.2")


def test_names_for_messages_say_all_that_was_asked_for() -> None:
    config = SelectionConfig(score="gate", budget_bytes=7, scale="raw", minus_general=True)
    assert (config.score_name, config.policy_name) == ("raw gate scores minus general", "budget_bytes=7")


def test_no_policy_is_an_error() -> None:
    message = (
        "(?s)policy: got none, expected exactly one of top_p, top_k, top_fraction, budget_bytes.*Name one, such as"
    )
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(score="token")


@pytest.mark.parametrize(
    ("policies", "got"),
    [
        ({"top_p": 0.2, "top_k": 4}, "top_p=0.2 and top_k=4"),
        ({"top_fraction": 0.25, "budget_bytes": 9}, "top_fraction=0.25 and budget_bytes=9"),
        ({"top_p": 0.2, "budget_bytes": 0}, "top_p=0.2 and budget_bytes=0"),
    ],
)
def test_two_policies_are_an_error(policies: dict[str, Any], got: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)policy: got {got}, expected exactly one of .*Leave all but one out"):
        SelectionConfig(score="token", **policies)


@pytest.mark.parametrize("name", ["top_p", "top_fraction"])
@pytest.mark.parametrize("value", [0, -0.1, 1.01, math.nan, True, "0.2"])
def test_a_share_outside_its_range_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be in \(0, 1\], got"):
        SelectionConfig(score="token", **{name: value})


@pytest.mark.parametrize("name", ["top_k", "budget_bytes"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_a_count_that_is_none_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be a whole number of at least 1, got"):
        SelectionConfig(score="token", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("score", "gates", "score: got 'gates', expected one of 'gate', 'token', 'output_norm'"),
        ("scale", "paper", "scale: got 'paper', expected one of 'normalised', 'raw'"),
        ("minus_general", "no", "minus_general: got 'no', expected True or False"),
    ],
)
def test_an_unknown_value_is_an_error(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**{"score": "token", "top_p": 0.2, name: value})


def test_a_share_of_raw_output_norms_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"(?s)scale: got 'raw' for output_norm scores with top_p.*Use scale='normal"):
        SelectionConfig(score="output_norm", top_p=0.2, scale="raw")
    SelectionConfig(score="output_norm", top_k=2, scale="raw")
    SelectionConfig(score="output_norm", top_p=0.2, scale="raw", minus_general=True)
