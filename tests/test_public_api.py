"""The public names resolve, and importing metier stays light."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import metier

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "matplotlib", "numpy", "pandas")
HELP_SECONDS = 1.0


@pytest.mark.parametrize("name", metier.__all__)
def test_public_name_resolves_to_an_object_of_that_name(name: str) -> None:
    assert getattr(metier, name).__name__ == name
    assert name in dir(metier)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'metier' has no attribute 'selct'"):
        metier.selct  # noqa: B018


def test_version_is_the_one_of_the_package() -> None:
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert f'version = "{metier.__version__}"' in pyproject.read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["metier", "metier.cli", "metier.config", "metier.errors", "metier.embedded"])
def test_importing_a_light_module_imports_no_heavy_package(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_takes_less_than_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "metier", "--help"], capture_output=True, text=True, check=True)
        assert "profile" in done.stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < HELP_SECONDS
