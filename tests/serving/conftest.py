"""One base with its facts and one delta of each kind, made once; tests alter copies.

Torch is imported where it is needed: half of the tests of this folder do without it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from metier.serving.checked_reader import CheckedReader
    from metier.serving.model_facts import ModelFacts


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    from serving.made_deltas import made_model

    return made_model()


@pytest.fixture(scope="session")
def facts(model: PreTrainedModel) -> ModelFacts:
    from metier.serving.model_facts import model_facts

    return model_facts(model, "tiny")


@pytest.fixture(scope="session")
def saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one delta of each kind, by its name."""
    from serving.made_deltas import save_esft, save_expert_lora, save_lora

    folder = tmp_path_factory.mktemp("served")
    save_esft(model, folder / "esft")
    save_expert_lora(model, folder / "expert_lora")
    save_lora(model, folder / "lora")
    return folder


@pytest.fixture
def copy_of(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a delta that the test may alter: by its kind, and under another name if one is given."""
    return lambda kind, name=None: Path(shutil.copytree(saved / kind, tmp_path / (name or kind)))


@pytest.fixture
def reader() -> Iterator[CheckedReader]:
    from metier.serving.checked_reader import CheckedReader

    reader = CheckedReader()
    yield reader
    reader.close()
