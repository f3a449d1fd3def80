"""A comparison's file: what it may say, and what is refused before a run begins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metier.errors import ConfigError
from metier.evaluation.comparison.config import FULL, load_comparison

TEXT = """
output_dir: out
model: embedded
tasks: [synopsis]
full_learning_rate: 1e-4
methods:
  - {method: vera, learning_rate: 1e-2, r: 64}
"""


def loaded(tmp_path: Path, text: str):
    path = tmp_path / "comparison.yaml"
    path.write_text(text)
    return load_comparison(path)


def test_full_fine_tuning_is_always_there(tmp_path: Path) -> None:
    config = loaded(tmp_path, TEXT)
    assert [(c.label, c.method, c.learning_rate) for c in config.candidates] == [
        (FULL, "full", 1e-4),
        ("VeRA", "vera", 1e-2),
    ]
    again = TEXT + "  - {method: full, learning_rate: 3e-5, label: mine}\n"
    assert [c.label for c in loaded(tmp_path, again).candidates] == ["VeRA", "mine"]


def test_a_candidates_keys_reach_its_run(tmp_path: Path) -> None:
    config = loaded(tmp_path, TEXT + "run: {max_steps: 7}\n")
    run = config.run_config(config.candidates[1], "synopsis", 0.5, 3, tmp_path)
    assert (run.method_options, run.max_steps, run.learning_rate, run.seed) == ({"r": 64}, 7, 0.5, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tusks: [a]\n", "unknown key 'tusks'. Did you mean 'tasks'?"),
        ("  - {method: vear, learning_rate: 1}\n", "methods[1]: got 'vear', which is no method. Did you mean 'vera'?"),
        ("  - {method: vera}\n", "expected `method` and `learning_rate`"),
        ("  - {method: vera, learning_rate: fast, label: b}\n", "methods[1]: learning_rate must be float, got 'fast'."),
        ("  - {method: vera, learning_rate: 1}\n", "the label 'VeRA' is there twice"),
        (
            "  - {method: esft, learning_rate: 1, experts: hot}\n",
            "experts must be relevant or random or coldest, got 'hot'.",
        ),
        ("  - {method: vera, learning_rate: 1, label: b, rr: 1}\n", "compare: b: unknown key 'rr'."),
        ("seeds: 3\n", "seeds must be a list, got 3."),
        ("seeds: []\n", "seeds must name at least one, got none."),
        ("learning_rate_factors: [2]\n", "learning_rate_factors must have 1, each candidate's own rate, got [2.0]."),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        loaded(tmp_path, TEXT + change).check_runs()


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing output_dir, model, tasks\. Add what is missing"):
        loaded(tmp_path, "seeds: [1]\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_comparison(tmp_path / "nothing.yaml")
