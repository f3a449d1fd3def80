"""The verb `export`: what goes with what, and the words in which it says what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from metier.cli import app
from metier.deltas.esft_checkpoint import write_esft_checkpoint
from metier.deltas.export import export
from metier.errors import ConfigError, DeltaError


def test_esft_is_the_checkpoint_that_export_esft_writes(delta_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    said = export(delta_folder, base_folder, tmp_path / "out", to="esft")
    assert said == [f"ESFT checkpoint: {tmp_path / 'out'}"]
    write_esft_checkpoint(delta_folder, base_folder, tmp_path / "want")
    arguments = ["export-esft", str(delta_folder), str(base_folder), "-o", str(tmp_path / "alias")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.stdout == f"ESFT checkpoint: {tmp_path / 'alias'}\n"
    want = {path.name: path.read_bytes() for path in (tmp_path / "want").iterdir()}
    for name in ("out", "alias"):
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == want


def test_the_verb_prints_what_was_written_and_what_was_checked(
    delta_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    arguments = ["export", str(delta_folder), str(base_folder), "--to", "merged", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--max-shard-size", "100KB"], catch_exceptions=False)
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    num_files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert num_files > 1
    assert first.startswith("Merged checkpoint of ")
    assert first.endswith(f" bytes in {num_files} files: {tmp_path / 'out'}")
    assert second == (
        "The experts' names and shapes are those that the loaders of DeepseekV2ForCausalLM in vLLM and SGLang look "
        "for. The loaders were read; the servers were not run."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "merged", "layout": "parameters"}, "layout: got 'parameters', which goes with peft-lora and not with"),
        ({"to": "peft-lora", "max_shard_size": "5GB"}, "max_shard_size: got '5GB', which goes with merged and not"),
        ({"to": "merged", "max_shard_size": "five"}, "max_shard_size: got 'five', expected a size such as 5GB"),
        ({"to": "gguf"}, "to: got 'gguf', expected one of merged, peft-lora, esft"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_read(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export("no/delta", "no/base", tmp_path / "out", **options)  # type: ignore[arg-type]


def test_what_is_no_adapter_is_refused(base_folder: Path, tmp_path: Path) -> None:
    for to in ("merged", "peft-lora", "esft"):
        with pytest.raises(DeltaError, match="got a whole model, expected a delta"):
            export(base_folder, base_folder, tmp_path / "out", to=to)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
