"""Checkpoints that can be trusted after a kill: one counts only once it is written in full.

The trainer writes a checkpoint file by file, and a run can be killed between two of them. So a marker goes into the
folder last, and only marked checkpoints are resumed. It names every file: where the optimizer's is gone the trainer
would begin with none, and say nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from metier.distributed.ranks import ranks_here, wait_for_all
from metier.errors import RunError

_MARKER = "complete"


class MarkCheckpoints(TrainerCallback):
    """Marks each checkpoint when the trainer has written it, and only then removes the oldest beyond a limit.

    The trainer's own limit removes before it tells of the new checkpoint: a kill in between would leave none.
    """

    def __init__(self, limit: int | None = None, note: Callable[[Path], None] | None = None) -> None:
        """`note` is called with a checkpoint's folder before it is marked, to write into it what belongs to it."""
        self.limit, self.note = limit, note

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # each process writes a part of it
        wait_for_all()
        if not ranks_here().is_main:
            return
        if self.note is not None:
            self.note(folder)
        # a mark may be left of a life that was killed, or of the steps that are taken again
        written = folder / f".{_MARKER}"
        marks = (folder / _MARKER, written)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in marks)
        for path in files:
            _flush(path)
        named = [f"{path.stat().st_size} {path.relative_to(folder).as_posix()}" for path in files]
        # under its name only once it is whole: an empty one would say that nothing belongs to the checkpoint
        written.write_text("\n".join([str(state.global_step), *named, ""]), encoding="utf-8")
        _flush(written)
        written.replace(folder / _MARKER)
        if self.limit is not None:
            for old in complete_checkpoints(Path(args.output_dir))[: -self.limit]:
                shutil.rmtree(old)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints that were written in full, oldest first."""
    complete = [marker.parent for marker in checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_MARKER}")]
    return sorted(complete, key=lambda folder: int(folder.name.rpartition("-")[2]))


def step_of(checkpoint: Path) -> int:
    """After how many steps a complete checkpoint was written, whatever its folder is called."""
    return int((checkpoint / _MARKER).read_text(encoding="utf-8").splitlines()[0])


def _check_files(checkpoint: Path) -> None:
    """Raise a RunError where a file is missing, or is not as large as it was written."""
    for line in (checkpoint / _MARKER).read_text(encoding="utf-8").splitlines()[1:]:
        size, _, name = line.partition(" ")
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != int(size):
            raise RunError(
                f"{path}: {'is missing' if found is None else f'has {found:,} bytes'}, was written with {int(size):,}. "
                "A run that went on without it would begin with another state.\nPut the file back, or resume from "
                "another checkpoint of the run."
            )


def find_checkpoint(checkpoints: Path, wanted: str) -> Path | None:
    """The checkpoint to resume: one of the run's own by its folder, or the newest complete one for `last`.

    None where `last` finds none: the run was stopped before its first, and begins again.

    Raises:
        RunError: the folder is another run's, was not written in full, or has lost a file since.
    """
    if wanted != "last":
        folder = Path(wanted)
        if not (folder / _MARKER).exists():
            raise RunError(f"{folder}: is not a complete checkpoint of metier. Resume from 'last' or another one.")
        if folder.resolve().parent != checkpoints.resolve():
            raise RunError(
                f"{folder}: is not a checkpoint of this run, whose are in {checkpoints}. Its rows may be other "
                "experts'; resume the run that it belongs to."
            )
        _check_files(folder)
        return folder
    complete = complete_checkpoints(checkpoints)
    if not complete:
        return None
    _check_files(complete[-1])
    return complete[-1]
