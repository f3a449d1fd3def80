"""The demo's runs, which are too long for a test of every day, can at least begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.planning.from_config import run_skeleton
from metier.training.demo import LEARNING_RATES, demo_config


@pytest.mark.parametrize("method", list(LEARNING_RATES))
def test_a_run_of_the_demo_is_configured_and_planned(method: str, tmp_path: Path) -> None:
    config = demo_config(method, "synopsis", tmp_path, 0)
    assert config.method == method
    assert run_skeleton(config).state(config).num_trained > 0
