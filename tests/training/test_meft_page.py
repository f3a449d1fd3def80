"""The runs that docs/meft.md shows, as a reader would start them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from documented_commands import blocks
from metier.config import RunConfig
from metier.config_reading import load_run_config
from metier.training.run import train

PAGE = Path(__file__).parents[2] / "docs" / "meft.md"


def shown(number: int, folder: Path, *words: str) -> RunConfig:
    """One of the page's files, with what comes behind it on the command line."""
    path = folder / "shown.yaml"
    path.write_text(blocks(PAGE.read_text(encoding="utf-8"), "yaml")[number])
    return load_run_config(path, ["--output_dir", str(folder / "run"), *words])


def test_a_dense_models_run_trains_with_less_rows_and_steps(
    base: Path, records: Path, tmp_path: Path, console: Console
) -> None:
    places = ("--model", str(base), "--dataset", str(records))
    config = shown(0, tmp_path, *places, "--meft_r", "64", "--max_steps", "2", "--max_length", "128")
    assert (config.method, config.meft_store) == ("meft", "host")
    folder = train(config, console=console).folder
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_embedded_models_run_trains(tmp_path: Path, console: Console) -> None:
    config = shown(1, tmp_path, "--max_steps", "2")
    assert (config.method, config.model) == ("meft", "embedded")
    rows = load_file(train(config, console=console).folder / "adapter" / "adapter_model.safetensors")
    trained = [tensor for name, tensor in rows.items() if name.endswith("meft_rows")]
    assert trained
    assert all(tensor[:, 1].any() for tensor in trained)
