"""A delta in figures, from its files alone and without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from deltas.made import made_adapter
from metier.deltas.inspect import inspect
from metier.errors import CorruptDeltaError
from tiny_models import tiny_model


def printed(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_figures_are_those_of_the_delta(delta_folder: Path, base_folder: Path) -> None:
    summary = inspect(delta_folder)
    assert summary.experts == {1: (1, 3), 2: (1, 3)}
    assert summary.num_parameters == 2 * 2 * 3 * 32 * 32
    assert summary.num_bytes == (delta_folder / "adapter_model.safetensors").stat().st_size
    assert summary.dtypes == ("F32",)
    assert summary.expert_share == 2 / 8
    assert summary.base_name == str(base_folder)
    text = printed(summary)
    for expected in ("ESFT", "12,288", "25.00%", "F32", "metier 0.", "checked", "2 of 8", "1, 3"):
        assert expected in text
    assert summary.base_fingerprint is not None
    assert summary.base_fingerprint in text


def test_what_peft_saved_has_no_sums_and_no_share(tmp_path: Path) -> None:
    made_adapter(tiny_model("mixtral"), experts={2: [0]}).save_pretrained(tmp_path)
    summary = inspect(tmp_path)
    assert summary.expert_share is None
    text = printed(summary)
    for expected in ("PEFT", "none in the files", "unknown", "1 of 4"):
        assert expected in text


def test_a_base_name_is_no_console_markup(delta_folder: Path) -> None:
    path = delta_folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "[red]x[/red]"}))
    assert "[red]x[/red]" in printed(inspect(delta_folder))


def test_a_broken_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptDeltaError, match="expected a delta"):
        inspect(tmp_path)


def test_looking_at_a_delta_loads_no_heavy_package(delta_folder: Path) -> None:
    code = (
        "import sys; from metier.deltas.inspect import inspect; inspect(sys.argv[1]); "
        "print(*{'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(delta_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
