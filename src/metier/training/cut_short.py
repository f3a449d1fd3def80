"""Runs that cannot go on: what was trained is kept as far as it can be, and what to do is said."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from metier.distributed.ranks import ranks_here
from metier.errors import NotFiniteError, RunError
from metier.memory.scratch_folder import held
from metier.models.load import first_line
from metier.training.checkpoints import complete_checkpoints
from metier.training.folder import RunFolder

_IN_USE = ".in-use"
"""Locked while a run goes on, and gone after it."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def alone_in(folder: RunFolder) -> Iterator[None]:
    """Train in a folder as the only process that does.

    Raises:
        RunError: another one does, such as a hung one that is about to be resumed.
    """
    with held(folder.root / _IN_USE) as is_free:
        if not is_free:
            raise RunError(
                f"{folder.root}: another process trains in this folder, and two would write over each other's files. "
                "End it first, or choose another output_dir."
            )
        yield


@contextmanager
def kept_after_error(trainer: Trainer, folder: RunFolder) -> Iterator[None]:
    """Where a step's gradients are not finite, keep the steps before that as a checkpoint.

    Raises:
        RunError: they were not; it names the checkpoint.
    """
    try:
        yield
    except NotFiniteError as error:
        steps = trainer.state.global_step
        if ranks_here().are_several or not steps:
            raise
        kept = folder.checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{steps}"
        try:
            if kept not in complete_checkpoints(folder.checkpoints):
                trainer._save_checkpoint(trainer.model, None)
                trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        except Exception as failed:  # a full disk, in one of several libraries' words
            raise RunError(
                f"{error}\nThe {steps} steps before could not be kept in {kept}: {first_line(failed)}"
            ) from error
        raise RunError(
            f"{error}\nThe {steps} steps before are kept in {kept}: PeftModel.from_pretrained loads it, and with a new "
            "output_dir a run can be tried with other settings."
        ) from error


@contextmanager
def full_disk_told(folder: RunFolder) -> Iterator[None]:
    """Say what a full disk means, in place of the words of whoever wrote to it.

    Raises:
        RunError: a file of the run could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_full_disk(error, folder):
            raise
        complete = complete_checkpoints(folder.checkpoints)
        good = f"The last complete checkpoint is {complete[-1]}" if complete else "There is no checkpoint"
        raise RunError(
            f"{folder.root}: a file could not be written, for the disk is full ({first_line(error)}).\n{good}. Make "
            "room and go on by --resume_from_checkpoint last."
        ) from error


def _is_of_full_disk(error: Exception, folder: RunFolder) -> bool:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    if "No space left on device" in str(error):
        return True
    # torch does not say why it could not write
    return "PytorchStreamWriter failed" in str(error) and shutil.disk_usage(folder.root).free < 1 << 20
