"""A tiny base and a few records in a folder, as a run finds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from metier.config import RunConfig
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model("deepseek_v2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    with path.open("w") as file:
        for number in range(24):
            question, answer = f"What is {number} and {number}?", f"It is {2 * number}."
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def configure(base: Path, records: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run's configuration, with changes."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        values = {
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_steps": 4,
            "logging_steps": 1,
            "max_length": 128,
            "profile_tokens": 512,
            "per_device_train_batch_size": 3,
            **changes,
        }
        return RunConfig(model=str(base), dataset=str(records), output_dir=str(tmp_path / name), **values)

    return make


@pytest.fixture
def console() -> Console:
    """A console that keeps what it is told, 200 characters wide: `console.file.getvalue()`."""
    return Console(file=StringIO(), width=200)
