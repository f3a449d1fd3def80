"""What is said about lm-evaluation-harness where it is not installed, and about options that go with it alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
from typer.testing import CliRunner

from metier.cli import app
from metier.errors import ConfigError
from metier.evaluation.harness_tasks import load_harness_tasks


@pytest.fixture
def without_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., ModuleSpec | None] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )


@pytest.mark.usefixtures("without_harness")
def test_without_the_harness_the_command_to_install_it_is_named() -> None:
    with pytest.raises(ConfigError, match=r"is not installed\.\nInstall it with: pip install 'metier\[harness\]'"):
        load_harness_tasks("hellaswag")


@pytest.mark.usefixtures("without_harness")
def test_the_command_line_says_so_before_it_loads_a_model() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'metier\[harness\]'"):
        CliRunner().invoke(app, ["evaluate", "no/such/model", "--harness", "hellaswag"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--harness", "a", "--task", "sections"], "got --task and --harness, expected one of them"),
        (["--fewshot", "2"], "--include-path, --fewshot and --chat-template are for --harness, which is missing"),
        (["--include-path", "."], "are for --harness"),
        (["--chat-template"], "are for --harness"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["evaluate", "no/such/model", *options], catch_exceptions=False)
