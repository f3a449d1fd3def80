"""How long a step of a run takes, by what it spends its time on, and what is moved between tiers of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metier.config import RunConfig
from metier.memory.row_update import are_copied
from metier.methods.wrap import meft_config
from metier.planning.clock import OPERATIONS, Clock
from metier.planning.estimate import Estimate

_GRADIENT_BYTES = 4
"""Of a number in a row that is trained, whatever the row's own are."""
_BYTES_OF = {"int8": 1, "nf4": 0.5}
"""Of a frozen number, its part of a scale left out."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step."""

    parts: dict[str, float]
    """What is done one after the other, by part (`clock.PARTS`)."""
    moves: dict[str, float]
    """What is moved meanwhile: between the device and `host`, and between memory and `disk`."""
    moved_bytes: dict[str, int]
    in_a_step: float
    """What the operations' times were multiplied by (`clock.IN_A_STEP`)."""

    @property
    def seconds(self) -> float:
        """Moving goes on beside computing; the longer of the two is what a step takes."""
        return max(sum(self.parts.values()), *self.moves.values())

    @property
    def operation_seconds(self) -> float:
        """Of operations by themselves."""
        return sum(self.parts[part] for part in OPERATIONS) / self.in_a_step

    @property
    def bottleneck(self) -> str:
        """What most of the time goes to, in words."""
        longest = max(self.moves, key=lambda tier: self.moves[tier])
        if self.moves[longest] >= sum(self.parts.values()):
            return f"what comes from the {longest}"
        return max(self.parts, key=lambda part: self.parts[part])

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "step_seconds": self.seconds,
            "operation_seconds": self.operation_seconds,
            "in_a_step": self.in_a_step,
            "seconds_by_part": {part.replace(" ", "_"): seconds for part, seconds in self.parts.items()},
            "seconds_by_move": self.moves,
            "moved_bytes": self.moved_bytes,
            "bottleneck": self.bottleneck,
        }


def step_time(estimate: Estimate, clock: Clock, *, free_bytes: int = 0) -> StepTime:
    """What a step takes.

    Args:
        estimate: with a trace, of a batch as most are.
        clock: of what it runs on.
        free_bytes: of memory that a run leaves; what is on disk and has room there is read once, and not in every step.
    """
    assert estimate.trace is not None, "asked for only where the step was traced"
    config, state = estimate.config, estimate.state
    batches = config.gradient_accumulation_steps
    parts = {part: batches * seconds for part, seconds in clock.passes(estimate.trace).items()}
    in_rows = state.row_gradient_bytes // _GRADIENT_BYTES
    fired = _fired_share(estimate)
    stepped = state.num_trained - in_rows if estimate.on_rank is None else estimate.on_rank.num_stepped
    if state.trained_bytes > state.row_bytes:
        # of MeZO nothing has a gradient, and its moves are in the trace; of LISA some layers have
        has_gradient = (state.gradient_bytes - state.row_gradient_bytes) / (state.trained_bytes - state.row_bytes)
        stepped = round(min(1.0, has_gradient) * stepped)
    parts["optimizer"] = clock.optimizer(stepped, round(fired * in_rows), copies_rows=_copies_rows(estimate, fired))
    if config.base_format is not None:
        numbers = int(state.stored_bytes / _BYTES_OF[config.base_format])
        parts["decoding"] = _passes(config) * clock.decoding(config.base_format, numbers)
    moved = moved_bytes(estimate, has_host=clock.has_host, free_bytes=free_bytes)
    moves = {"host": clock.from_host(moved["host"]), "disk": clock.from_disk(moved["disk"]) if moved["disk"] else 0.0}
    return StepTime(parts, moves, moved, clock.in_a_step)


def moved_bytes(estimate: Estimate, *, has_host: bool, free_bytes: int = 0) -> dict[str, int]:
    """What a step moves between tiers, by the tier that is not the device: `host` and `disk`.

    Args:
        estimate: of a batch as most are.
        has_host: the host's memory is not the device's.
        free_bytes: as of `step_time`.
    """
    config, state = estimate.config, estimate.state
    moved = {"host": 0, "disk": 0}
    if config.base_store != "device":
        moved[config.base_store] += _passes(config) * state.stored_bytes
    if config.method == "meft" and config.meft_store != "device":
        # rows and their gradients; a disk also has what the optimizer reads and writes, unless memory has room for it
        fired = _fired_share(estimate)
        passing = 1.0
        if config.meft_store == "host" and has_host:
            # what is kept on the device is updated there
            passing -= min(1.0, config.meft_cache_bytes / (state.row_bytes + state.row_state_bytes))
        moved[config.meft_store] += round(passing * fired * (state.row_bytes + state.row_gradient_bytes))
        if config.meft_store == "disk":
            moved["disk"] += 2 * round(fired * (state.row_bytes + state.row_state_bytes))
    if not has_host:
        moved["host"] = 0
    if estimate.disk_bytes <= free_bytes:
        moved["disk"] = 0
    return moved


def _passes(config: RunConfig) -> int:
    """How often a step goes through a frozen weight: forward, again for what was not kept, and backward."""
    return (2 + config.gradient_checkpointing) * config.gradient_accumulation_steps


def _copies_rows(estimate: Estimate, fired: float) -> bool:
    config = estimate.config
    dtype = getattr(torch, config.meft_row_dtype)
    return are_copied(estimate.hidden_size, dtype, config.meft_state_dtype, share=fired, on_cpu=True)


def _fired_share(estimate: Estimate) -> float:
    """Of a sparse adapter's rows, those that a step updates, each being as likely as any other to fire for a token."""
    config = estimate.config
    if config.method != "meft":
        return 0.0
    sizes = meft_config(config).sizes
    num_tokens = estimate.num_tokens * config.gradient_accumulation_steps
    unused: float = (1 - sizes.top_k / sizes.r) ** num_tokens
    return 1 - unused
