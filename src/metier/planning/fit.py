"""Which runs fit into the memory that there is, and the smallest change that makes another one fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from metier.catalogue.tree import method_of
from metier.config import POLICIES, RunConfig
from metier.errors import MetierError
from metier.methods.wrap import selects_experts
from metier.planning.estimate import Estimate
from metier.planning.from_config import ASSUMED_SHARE
from metier.planning.step import Batch


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory that a run may take, in bytes."""

    device_bytes: int
    host_bytes: int | None
    """None where device and host are one memory."""
    runtime_bytes: int = 0
    """What the process takes on the device, or on a CPU in all, beside the run's tensors."""

    def lacking_bytes(self, estimate: Estimate) -> int:
        """By how much a run is too large; 0 where it fits."""
        return sum(max(0, lacking) for _, lacking in self._taken_and_lacking(estimate))

    def free_bytes(self, estimate: Estimate) -> int:
        """That a run leaves of the memory beside which its disk is."""
        if self.host_bytes is not None:
            return max(0, self.host_bytes - estimate.host_bytes)
        taken = estimate.total_device_bytes + estimate.host_bytes + self.runtime_bytes
        return max(0, self.device_bytes - taken)

    def fits(self, estimate: Estimate, *, may_be_wrong: float = 0.0) -> bool:
        """Whether a run does, if by so much of it too much may be foreseen."""
        return all(lacking <= may_be_wrong * taken for taken, lacking in self._taken_and_lacking(estimate))

    def _taken_and_lacking(self, estimate: Estimate) -> list[tuple[int, int]]:
        """Of each memory what a run takes, and by how much that is too large, which is below 0 where it fits."""
        device, host = estimate.total_device_bytes, estimate.host_bytes
        if self.host_bytes is None:
            taken = device + host
            return [(taken, taken + self.runtime_bytes - self.device_bytes)]
        return [(device, device + self.runtime_bytes - self.device_bytes), (host, host - self.host_bytes)]


@dataclass(frozen=True, slots=True)
class Change:
    """A run that fits, and what of another one was changed for it."""

    keys: dict[str, Any]
    """Those that are to have another value."""
    estimate: Estimate

    def __str__(self) -> str:
        return ", ".join(f"{key}: {shown_value(value)}" for key, value in self.keys.items())


class Estimates(Protocol):
    """Says what a run takes: of one process alone, or of one of several."""

    world_size: int

    def __call__(self, config: RunConfig, batch: Batch | None = None) -> Estimate:
        """All of it, of a full batch where none is given."""
        ...

    def without_activations(self, config: RunConfig) -> Estimate:
        """The state alone, which is quick."""
        ...


def smallest_change(config: RunConfig, budget: Budget, estimator: Estimates) -> Change | None:
    """The first of single changes, then as few of them together as it takes, with which a run fits; None if none does.

    Args:
        config: a run that does not fit.
        budget: what it may take.
        estimator: says what a run takes.
    """

    def fitting(changes: Sequence[dict[str, Any]]) -> Change | None:
        keys = {key: value for change in changes for key, value in change.items()}
        try:
            wanted = changed(config, keys)
            # its state alone is known at once
            if not budget.fits(estimator.without_activations(wanted)):
                return None
            estimate = estimator(wanted)
        except MetierError:  # not with this method, this model, or what is installed
            return None
        keys = {key: value for key, value in keys.items() if getattr(config, key) != value}
        return Change(keys, estimate) if estimate.trace is not None and budget.fits(estimate) else None

    state = estimator.without_activations(config).total_bytes

    def is_smaller(change: dict[str, Any]) -> bool:
        """Of fewer experts, whether they are: a profile may select fewer than are assumed."""
        if "select_top_fraction" not in change:
            return True
        return estimator.without_activations(changed(config, change)).total_bytes < state

    has_host, is_alone = budget.host_bytes is not None, estimator.world_size == 1
    singles = [change for change in _changes(config, has_host=has_host, is_alone=is_alone) if is_smaller(change)]
    for change in singles:
        if found := fitting([change]):
            return found
    for number in range(2, len(singles) + 1):
        taken = singles[:number]
        if found := fitting(taken):
            for change in taken[-2::-1]:  # the last one is needed: without it they did not fit
                fewer = [other for other in taken if other is not change]
                if without := fitting(fewer):
                    taken, found = fewer, without
            return found
    return None


def _changes(config: RunConfig, *, has_host: bool, is_alone: bool = True) -> Iterator[dict[str, Any]]:
    """What may be changed, the change that costs least first; a later one goes before an earlier one of its key."""
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    rows = config.per_device_train_batch_size
    if rows > 1:
        batches = rows * config.gradient_accumulation_steps
        yield {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batches}
    if not (method_of(config.method).changes_base or config.fsdp):
        if config.base_store == "device" and has_host:
            yield {"base_store": "host"}
        if config.base_format is None:
            yield {"base_format": "int8"}
        if config.base_store != "disk":
            yield {"base_store": "disk"}
        if config.base_format != "nf4":
            yield {"base_format": "nf4"}
    if config.select_top_k is not None and config.select_top_k > 1:
        yield {"select_top_k": config.select_top_k // 2}
    elif config.select_top_fraction is not None:
        yield {"select_top_fraction": config.select_top_fraction / 2}
    elif selects_experts(config) and config.selection is None and config.select_top_k is None:
        # where it is not known how many the task's scores select, the half of what is assumed
        yield {**dict.fromkeys(POLICIES), "select_top_fraction": ASSUMED_SHARE / 2}
    if config.method == "meft":
        if config.meft_store == "device" and has_host:
            yield {"meft_store": "host"}
        if config.meft_store != "disk" and is_alone:
            yield {"meft_store": "disk"}
    if config.dtype in ("float32", "auto"):
        yield {"dtype": "bfloat16"}
    length = config.max_length
    while length > 256:
        length //= 2
        yield {"max_length": length}


def changed(config: RunConfig, keys: dict[str, Any]) -> RunConfig:
    """The run with some keys set to other values."""
    return dataclasses.replace(config, **keys)


def shown_value(value: object) -> str:
    """As YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
