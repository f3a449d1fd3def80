"""How an evaluation leaves no trace: the model gets its own mode back, the random generators their states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for a while; each module's own mode comes back, also after an error.

    Not torch's inference mode: what a model makes and keeps there (a router converted to another dtype, say) could not
    be trained with afterwards.
    """
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in was_training:
            module.training = mode


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn or seeded meanwhile, the generators of Python, numpy and torch go on as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
