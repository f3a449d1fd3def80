"""What the report of a run is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError

import pytest
from rich.console import Console

from metier.config import RunConfig
from metier.training import folder as run_folder
from metier.training.report import routing_data
from metier.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")


def test_scores_are_shown_only_where_they_are_what_selected(
    configure: Callable[..., RunConfig], console: Console
) -> None:
    config = configure()
    result = train(config, console=console)
    folder = run_folder.RunFolder(result.folder)
    shown = routing_data(folder, config, result.selection)
    assert shown["selected"] == result.selection.experts
    assert shown["top_p"] == 0.2
    assert 0 <= shown["reliability"] <= 1
    # differences of two profiles, of which the folder has one, would be shown as shares of the one
    minus = dataclasses.replace(config, minus_general=True, general_dataset=config.dataset)
    assert routing_data(folder, minus, result.selection) == {}
    assert routing_data(folder, config, None) == {}


def test_packages_that_are_not_installed_are_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "metier":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(run_folder, "version", version)
    found = run_folder.package_versions()
    assert found["metier"] == "(not installed as a package)"
    assert found["torch"] == "1.0"
