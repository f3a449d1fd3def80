"""One base and one delta on disk for tests that only read or alter copies of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deltas.made import made_adapter, made_base
from metier.deltas.save import save_delta


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deltas") / "base"
    made_base(folder)
    return folder


@pytest.fixture(scope="session")
def _saved(base_folder: Path) -> Path:
    import metier

    folder = base_folder.parent / "adapter"
    save_delta(made_adapter(metier.load(base_folder).model), folder)
    return folder


@pytest.fixture
def delta_folder(_saved: Path, tmp_path: Path) -> Path:
    """A delta that the test may spoil."""
    return Path(shutil.copytree(_saved, tmp_path / "adapter"))
