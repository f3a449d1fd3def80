"""The command line: verbs, options that become a run's keys, and errors without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from metier.cli import app
from metier.config import RunConfig

VERBS = ("demo", "profile", "select", "train", "evaluate", "inspect", "verify", "merge", "export")
VERBS += ("analyse", "import-esft", "export-esft", "compress", "decompress", "compose", "methods", "compare", "search")
VERBS += ("serve",)
REQUIRED = ["--model", "embedded", "--dataset", "a.jsonl", "--output_dir", "runs/a"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert f"Usage: root {verb}" in result.output


def test_help_of_train_lists_a_runs_keys() -> None:
    output = CliRunner().invoke(app, ["train", "--help"]).output
    assert "learning_rate: Peak learning rate." in output


def metier(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "metier", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_an_error_is_one_line_without_a_traceback() -> None:
    done = metier("train", *REQUIRED, "--learning_rat", "1")
    assert done.returncode == 2
    assert done.stderr == "error: command line: unknown key 'learning_rat'. Did you mean 'learning_rate'?\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("before", "environment"), [(["--debug"], {}), ([], {"METIER_DEBUG": "1"})], ids=["option", "variable"]
)
def test_debug_shows_the_traceback(before: list[str], environment: dict[str, str]) -> None:
    done = metier(*before, "train", *REQUIRED, "--learning_rat", "1", **environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that `metier.training.run.train` is called with, without training."""
    configs: list[RunConfig] = []
    run = ModuleType("metier.training.run")
    run.train = lambda config, force: configs.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "metier.training", ModuleType("metier.training"))
    monkeypatch.setitem(sys.modules, "metier.training.run", run)
    return configs


def test_train_takes_all_keys_as_options(trained: list[RunConfig]) -> None:
    result = CliRunner().invoke(app, ["train", *REQUIRED, "--bf16", "--learning-rate=3e-4"], catch_exceptions=False)
    assert result.exit_code == 0
    assert (trained[0].model, trained[0].bf16, trained[0].learning_rate) == ("embedded", True, 3e-4)


def test_train_takes_a_file_and_options_that_go_before_it(tmp_path: Path, trained: list[RunConfig]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: a\ndataset: b\noutput_dir: c\nseed: 1\n")
    CliRunner().invoke(app, ["train", str(path), "--seed", "2"], catch_exceptions=False)
    assert (trained[0].model, trained[0].seed) == ("a", 2)
