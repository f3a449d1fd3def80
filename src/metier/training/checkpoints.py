"""Checkpoints that can be trusted after a kill: one counts only once it is written in full.

The trainer writes a checkpoint file by file, and a run can be killed between two of them. So a marker goes into the
folder last, and only marked checkpoints are resumed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from metier.errors import RunError

_MARKER = "complete"


class MarkCheckpoints(TrainerCallback):
    """Marks each checkpoint when the trainer has written it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for path in folder.rglob("*"):
            if path.is_file():
                _flush(path)
        (folder / _MARKER).write_text(f"{state.global_step}\n", encoding="utf-8")
        _flush(folder / _MARKER)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def find_checkpoint(checkpoints: Path, wanted: str) -> Path:
    """The checkpoint to resume: a folder, or the newest complete one for `last`.

    Raises:
        RunError: there is none, or it was not written in full.
    """
    if wanted != "last":
        folder = Path(wanted)
        if not (folder / _MARKER).exists():
            raise RunError(f"{folder}: is not a complete checkpoint of metier. Resume from 'last' or another one.")
        return folder
    complete = [marker.parent for marker in checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_MARKER}")]
    if not complete:
        raise RunError(
            f"{checkpoints}: there is no complete checkpoint to resume from. The run was stopped before its first; "
            "start it anew in another output_dir, with a smaller save_steps."
        )
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]))
