"""A run's file on tiny bases and records, for one process and for several."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny bases and records."""
    folder = tmp_path_factory.mktemp("world")
    for family, name in (("deepseek_v2", "moe"), ("llama", "dense")):
        tiny_model(family).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    with (folder / "records.jsonl").open("w") as file:
        for number in range(120):
            answer = f"It is {2 * number}." + " Yes." * (number % 5)
            messages = [
                {"role": "user", "content": f"What is {number} and {number}?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


@pytest.fixture(scope="session")
def run_file_of(world: Path) -> Callable[..., Path]:
    """Writes a run's YAML file into a folder, with changes (None: without the key); the run's own folder is in it."""

    def make(folder: Path, name: str, **changes: object) -> Path:
        values: dict[str, object] = {
            "model": str(world / "moe"),
            "dataset": str(world / "records.jsonl"),
            "output_dir": str(folder / name),
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_steps": 10,
            "logging_steps": 1,
            "max_length": 128,
            "profile_tokens": 2048,
            "select_top_k": 3,
            "per_device_train_batch_size": 2,
            "global_batch_size": 8,
            **changes,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return make


@pytest.fixture
def run_file(run_file_of: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same, into the test's folder."""
    return partial(run_file_of, tmp_path)
