"""The mode in which every evaluation runs a model, and how the model gets its own mode back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval and inference mode for a while; each module's own mode comes back, also after an error."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in was_training:
            module.training = mode
