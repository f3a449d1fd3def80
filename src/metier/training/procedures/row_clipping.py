"""The trainer's clipping, where some of what it clips are gradients of rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from metier.memory import clip_grad_norm_


def clip_rows_in_parts(trainer: Trainer) -> None:
    """Have the trainer read gradients of rows some at a time, and leave those on disk as they are written."""

    def clip(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: Any = 2) -> Tensor:
        assert norm_type == 2, "the trainer clips by the 2-norm"
        trainer.accelerator.unscale_gradients()
        return clip_grad_norm_(parameters, max_norm)

    trainer.accelerator.clip_grad_norm_ = clip
