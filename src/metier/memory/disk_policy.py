"""Which pages of stores on disk to give up when memory is short. Plain Python.

A step of training is a fixed program: forward through the layers, backward, the norm of the gradients, then the
optimizer's layers in turn. So it is known when each thing is wanted next, and what is wanted last is given up first.
(The system's own rule, what was used least recently, gives up on such a cycle what is wanted next.)
"""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["weights", "rows", "state", "gradients"]
Phase = Literal["forward", "backward", "norm", "optimizer"]
_USED_IN: dict[Kind, tuple[Phase, ...]] = {
    "weights": ("forward", "backward"),
    "rows": ("forward", "backward", "optimizer"),
    "state": ("optimizer",),
    "gradients": ("backward", "norm", "optimizer"),
}
_PHASES = get_args(Phase)


def place(phase: Phase, layer: int, num_layers: int) -> int:
    """When a step comes to a layer in a phase, counted in layers from its begin."""
    within = num_layers - 1 - layer if phase == "backward" else layer
    return _PHASES.index(phase) * num_layers + within


def next_use(kind: Kind, layer: int, num_layers: int, now: int) -> int:
    """How many layers' work away something is wanted again, at least 1.

    Args:
        kind: what it is.
        layer: whose.
        num_layers: with a store.
        now: where the step is, by `place`.
    """
    period = len(_PHASES) * num_layers
    return min((place(phase, layer, num_layers) - now - 1) % period + 1 for phase in _USED_IN[kind])
