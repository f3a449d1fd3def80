"""What one of several processes holds and sends: with a copy of the weights (DDP), or with a shard of them (FSDP2).

State and bytes sent are exact, the peak is an upper bound: the unit in use and the one that is fetched ahead of it may
not be the largest two when the most is held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from metier.config import RunConfig
from metier.methods.wrap import meft_config
from metier.planning.estimate import TRACED, Estimate, Estimator
from metier.planning.step import Batch
from metier.planning.units import Unit, cast_bytes

GATHERED, SENT = "gathered weights", "gradients sent"
PARTED_KINDS = (
    "frozen weights", "fetched weights", GATHERED, "trained weights", "gradients", SENT, "optimizer state", *TRACED,
)  # fmt: skip
"""Of device memory in several processes. Gathered are the unit in use, the next one, and what stays whole from its
forward to its backward pass; sent are DDP's buckets, or the gradients of a unit that FSDP2 reduces and scatters."""
DDP, FSDP2 = "ddp", "fsdp2"


@dataclass(frozen=True, slots=True)
class OnRank:
    """What one of several processes does in a step of the optimizer, beside what one alone does."""

    world_size: int
    way: str
    """`DDP` or `FSDP2`."""
    sent: dict[str, int]
    """Bytes that it sends, by collective, each in a ring; sums of single numbers are left out."""
    num_stepped: int
    """Numbers that its optimizer updates, rows in stores left out."""

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sent = {collective.replace("-", "_").replace(" ", "_"): number for collective, number in self.sent.items()}
        return {"world_size": self.world_size, "way": self.way, "sent_bytes": sent}


class RankEstimator:
    """As `Estimator`, of one process of several.

    Args:
        estimator: of one process alone; what it has traced serves every number of processes.
        world_size: processes.
    """

    def __init__(self, estimator: Estimator, world_size: int) -> None:
        self.estimator, self.world_size = estimator, world_size

    def __call__(self, config: RunConfig, batch: Batch | None = None) -> Estimate:
        """What the process will take."""
        return self._on_rank(self.estimator(config, batch))

    def without_activations(self, config: RunConfig) -> Estimate:
        """The state alone, which is quick."""
        return self._on_rank(self.estimator.without_activations(config))

    def _on_rank(self, estimate: Estimate) -> Estimate:
        if not estimate.config.fsdp:
            return _copied(estimate, self.world_size)
        return _sharded(estimate, self.world_size, on_accelerator=self.estimator.has_host)


def _copied(estimate: Estimate, world_size: int) -> Estimate:
    """By DDP: all that there is, and its buckets, through which gradients are summed once a step."""
    state = estimate.state
    buckets = state.gradient_bytes - state.row_gradient_bytes
    several = world_size > 1
    device = {**estimate.device_bytes, GATHERED: 0, SENT: buckets * several}
    sent = {"all-reduce": _ring(2 * buckets, world_size), "all-reduce of rows": _rows_sent(estimate, world_size)}
    numbers = state.num_trained - state.row_gradient_bytes // 4
    return _replaced(estimate, device, OnRank(world_size, DDP, sent, numbers))


def _sharded(estimate: Estimate, world_size: int, *, on_accelerator: bool) -> Estimate:
    """By FSDP2: a shard of everything but a sparse adapter."""
    state, units, batches = estimate.state, estimate.units, estimate.config.gradient_accumulation_steps
    cast = cast_bytes(bf16=estimate.config.bf16, on_accelerator=on_accelerator)
    device, trained = estimate.device_bytes, _shards(units, world_size, trained=True)
    of_rows = {
        "trained weights": device["trained weights"] - (state.trained_bytes - state.row_bytes),
        "optimizer state": device["optimizer state"] - (state.optimizer_bytes - state.row_state_bytes),
    }
    gathered = [unit.gathered_bytes(world_size, cast) for unit in units]
    gradients, whole = _gradients(estimate, world_size, cast)
    device = {
        **device,
        # what is no parameter is whole in each
        "frozen weights": _shards(units, world_size, trained=False) + state.kept_bytes,
        GATHERED: _most_gathered(units, gathered),
        "trained weights": trained + of_rows["trained weights"],
        "gradients": gradients,
        SENT: max((unit.reduced_bytes(world_size, cast) for unit in units), default=0),
        "optimizer state": 2 * trained + of_rows["optimizer state"],
        "activations": max(0, device["activations"] - whole),
    }
    again = sum(unit.num_gathers * num_bytes for unit, num_bytes in zip(units, gathered, strict=True))
    sent = {
        "all-gather": _ring(batches * again, world_size),
        "reduce-scatter": _ring(sum(unit.reduced_bytes(world_size, cast) for unit in units), world_size),
        "all-reduce": _ring(2 * _router_bytes(units), world_size),
        "all-reduce of rows": _rows_sent(estimate, world_size),
    }
    numbers = sum(p.shard_numbers(world_size) for unit in units for p in unit.parts if p.is_trained)
    return _replaced(estimate, device, OnRank(world_size, FSDP2, sent, numbers))


def _replaced(estimate: Estimate, device: dict[str, int], on_rank: OnRank) -> Estimate:
    ordered = {kind: device[kind] for kind in PARTED_KINDS}
    sent = {collective: num_bytes for collective, num_bytes in on_rank.sent.items() if num_bytes}
    on_rank = dataclasses.replace(on_rank, sent=sent)
    return dataclasses.replace(estimate, device_bytes=ordered, on_rank=on_rank)


def _ring(num_bytes: int, world_size: int) -> int:
    """Of bytes that go round a ring, what one process sends."""
    return num_bytes * (world_size - 1) // world_size


def _shards(units: Iterable[Unit], world_size: int, *, trained: bool) -> int:
    return sum(unit.shard_bytes(world_size, trained=trained) for unit in units)


def _router_bytes(units: Iterable[Unit]) -> int:
    """Of a sparse adapter's routers, which are left whole in each process."""
    return sum(part.num_numbers * part.itemsize for unit in units for part in unit.parts if part.is_replica)


def _most_gathered(units: tuple[Unit, ...], gathered: list[int]) -> int:
    """What stays, and of the others the largest two that follow one another."""
    stay = sum(num for unit, num in zip(units, gathered, strict=True) if unit.stays_gathered)
    go = [num for unit, num in zip(units, gathered, strict=True) if not unit.stays_gathered]
    return stay + max((sum(pair) for pair in pairwise(go)), default=sum(go))


def _gradients(estimate: Estimate, world_size: int, cast: int | None) -> tuple[int, int]:
    """Bytes of gradients at the peak, and of those whole ones that one process alone has among its activations.

    Between the batches of a step accelerate leaves gradients whole, and sends them after the last one.
    """
    state, units = estimate.state, estimate.units
    of_rows = state.row_gradient_bytes
    if estimate.config.gradient_accumulation_steps > 1:
        whole = sum(unit.gradient_bytes(cast) for unit in units)
        return of_rows + whole + _router_bytes(units), 0
    peak = None if estimate.trace is None else estimate.trace.peak()
    if peak is None or peak.layer is None:
        return of_rows, 0
    num_layers = sum(unit.layer is not None for unit in units)
    behind = [unit for unit in units if unit.layer is not None and unit.layer > peak.layer]
    after = [unit for unit in units if unit.name == "norm and output layer" and peak.layer < num_layers]
    return of_rows + _shards([*behind, *after], world_size, trained=True), sum(u.gradient_bytes(None) for u in after)


def _rows_sent(estimate: Estimate, world_size: int) -> int:
    """Of a sparse adapter's rows, gradients of those blocks that some process is expected to use, and their flags."""
    config, state = estimate.config, estimate.state
    if config.method != "meft" or world_size == 1:
        return 0
    sizes = meft_config(config).sizes
    num_tokens = estimate.num_tokens * config.gradient_accumulation_steps * world_size
    used: float = 1 - (1 - sizes.num_active_key_experts / sizes.num_key_experts) ** num_tokens
    num_layers = sum(1 for row in state.rows if row.row_gradient_bytes)
    flags = 4 * sizes.r * num_layers
    counts = 8 * sizes.num_key_experts * num_layers
    return _ring(2 * (round(used * (state.row_gradient_bytes + flags)) + counts), world_size)
