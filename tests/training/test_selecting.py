"""A run selects by the policy that it names, from as much data as it asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from metier.config import RunConfig
from metier.errors import ConfigError
from metier.models.load import load
from metier.models.moe import moe_layers
from metier.routing.configured import selection_config
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import ExpertSelection, SelectionConfig, expert_bytes, select
from metier.training.run import train

Configure = Callable[..., RunConfig]


def test_without_a_policy_the_papers_is_taken(configure: Configure) -> None:
    assert selection_config(configure()) == SelectionConfig(score="token", top_p=0.2)
    named = configure(score="gate", score_scale="raw", select_top_fraction=0.25)
    assert selection_config(named) == SelectionConfig(score="gate", scale="raw", top_fraction=0.25)


def test_a_run_takes_so_many_experts_in_each_layer(configure: Configure, console: Console) -> None:
    result = train(configure(select_top_k=3, score="output_norm"), console=console)
    assert result.selection is not None
    assert {len(ids) for ids in result.selection.experts.values()} == {3}
    measured = RoutingProfile.load(result.folder)
    assert measured.output_norm_HLE is not None
    assert result.selection.experts == select(measured, SelectionConfig(score="output_norm", top_k=3)).experts


def test_a_run_keeps_to_a_budget_of_bytes(configure: Configure, console: Console) -> None:
    sizes = expert_bytes(load(configure().model).model)
    budget = 5 * max(sizes.values())
    result = train(configure(select_budget_bytes=budget), console=console)
    assert result.selection is not None
    taken = sum(sizes[layer] * len(ids) for layer, ids in result.selection.experts.items())
    assert budget - max(sizes.values()) < taken <= budget


def test_a_run_subtracts_the_scores_of_its_general_data(configure: Configure, console: Console, tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    texts = [f"{number} is a number, as is {number + 7}, and so on and on." for number in range(40)]
    general.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"select_top_k": 2, "general_dataset": str(general)}
    plain = train(configure("plain", **options), console=console).selection
    minus = train(configure("minus", minus_general=True, **options), console=console).selection
    assert plain is not None
    assert minus is not None
    assert plain.experts != minus.experts


def test_a_run_stops_profiling_when_the_selection_is_stable(configure: Configure, console: Console) -> None:
    num_layers = len(moe_layers(load(configure().model).model))
    result = train(
        configure(select_top_k=8, profile_until_stable=True, max_length=32, profile_tokens=100_000), console=console
    )
    assert result.selection is not None
    # all eight experts of a layer: the halves agree at the first look
    assert result.selection.num_selected == 8 * num_layers
    assert RoutingProfile.load(result.folder).meta["stable_after_tokens"] != "never"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_p": 0.2, "select_top_k": 3}, "must have one value among them at most"),
        ({"minus_general": True}, "minus_general needs general_dataset"),
        ({"select_top_fraction": 1.5}, r"select_top_fraction must be in \(0, 1\], got 1.5"),
        ({"select_top_k": 0}, "select_top_k must be at least 1, got 0"),
        ({"select_budget_bytes": 0}, "select_budget_bytes must be at least 1, got 0"),
        ({"stability_threshold": 0.0}, r"stability_threshold must be in \(0, 1\]"),
        ({"selection": "s.json", "top_p": 0.3}, "selection names the experts already, so top_p would be ignored"),
        ({"selection": "s.json", "profile_until_stable": True}, "so profile_until_stable would be ignored"),
    ],
)
def test_policies_that_exclude_each_other_are_refused(options: dict, text: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=text):
        configure(**options)


def test_what_cannot_be_selected_by_is_refused_before_anything_is_loaded(
    configure: Configure, console: Console
) -> None:
    config = configure(score="output_norm", score_scale="raw", top_p=0.2)
    with pytest.raises(ConfigError, match="norms have no unit"):
        train(config, console=console)
    assert not Path(config.output_dir).exists()


def test_experts_named_by_a_file_need_no_profile(configure: Configure, console: Console, tmp_path: Path) -> None:
    ExpertSelection(experts={1: (2,)}).save(tmp_path / "selection.json")
    result = train(configure(selection=str(tmp_path / "selection.json")), console=console)
    assert not (result.folder / "profile.json").exists()
