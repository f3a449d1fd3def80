"""A tiny base and a few records in a folder, as a run finds them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from metier.config import RunConfig
from metier.training.run import train
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
def kill_and_resume(configure: Callable[..., RunConfig], console: Console) -> Callable[..., tuple[Path, Path]]:
    """Folders of a run that went through, and of one that was killed after two checkpoints and resumed."""

    def run(**options: Any) -> tuple[Path, Path]:
        straight = train(configure("straight", **options), console=console)
        config = configure("killed", **options)
        Path(config.output_dir).with_suffix(".yaml").write_text(config.to_yaml())
        command = [sys.executable, "-m", "metier", "train", str(Path(config.output_dir).with_suffix(".yaml"))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoints = Path(config.output_dir) / "checkpoints"
        deadline = time.monotonic() + 120
        while len(list(checkpoints.glob("*/complete"))) < 2:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (Path(config.output_dir) / "adapter").exists(), "the run was over before it was killed"
        resumed = train(configure("killed", resume_from_checkpoint="last", **options), console=console)
        return straight.folder, resumed.folder

    return run


@pytest.fixture
def console() -> Console:
    """A console that keeps what it is told, 200 characters wide: `console.file.getvalue()`."""
    return Console(file=StringIO(), width=200)
