"""Runs that cannot go on: another process has the folder, or the disk is full."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import SafetensorError

from metier.config import RunConfig
from metier.errors import RunError
from metier.training import run as module
from metier.training.cut_short import alone_in, full_disk_told
from metier.training.folder import RunFolder
from metier.training.run import train

Configure = Callable[..., RunConfig]
HOLD = """
import sys
from pathlib import Path
from metier.memory.scratch_folder import held
with held(Path(sys.argv[1])) as is_free:
    print(is_free, flush=True)
    sys.stdin.readline()
"""


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".in-use")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline().strip() == "True"
        with pytest.raises(RunError, match="another process trains in this folder"), alone_in(folder):
            pass
        other.kill()
    with alone_in(folder):
        assert (tmp_path / ".in-use").exists()
    assert list(tmp_path.iterdir()) == []


NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "free", "is_told"),
    [
        (NO_ROOM, 1 << 40, True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1 << 40, True),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), 1000, True),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), 1 << 40, False),
        (OSError(errno.EACCES, "Permission denied"), 1000, False),
        (RuntimeError("size mismatch"), 1000, False),
    ],
)
def test_a_full_disk_is_told_apart_from_other_errors(
    error: Exception, free: int, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    expected = RunError if is_told else type(error)
    with pytest.raises(expected), full_disk_told(RunFolder(tmp_path)):
        raise error


@pytest.mark.parametrize("save_steps", [None, 1])
def test_a_disk_that_is_full_at_the_end_names_the_last_good_checkpoint(
    save_steps: int | None, configure: Configure, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NO_ROOM

    monkeypatch.setattr(module, "_save", fail)
    config = configure(max_steps=2, save_steps=save_steps)
    told = "There is no checkpoint" if save_steps is None else "The last complete checkpoint is .*checkpoint-2"
    with pytest.raises(RunError, match=f"the disk is full(?s:.*){told}"):
        train(config, console=console)
