"""What a run will take, from its configuration alone: bytes by kind and place, floating-point operations, its delta.

State is exact, activations are traced. What is not known before a step (which experts its tokens choose) is drawn at
random, and said so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.errors import UnsupportedModelError
from metier.memory.row_update import buffer_bytes
from metier.methods.virtual_tokens import num_virtual_tokens
from metier.methods.wrap import meft_config, selects_experts
from metier.models.moe import is_dense
from metier.planning.as_method import as_method
from metier.planning.devices import ALLOCATION_BYTES
from metier.planning.from_config import run_skeleton
from metier.planning.routes import Chances, assumed_chances, chances_of
from metier.planning.segments import Peak, StepTrace
from metier.planning.state import TrainingPlan, saved_bytes
from metier.planning.step import Batch, trace_step, uneven_rows
from metier.planning.units import Unit, units_of
from metier.routing.routing_profile import RoutingProfile
from metier.routing.selection import ExpertSelection

if TYPE_CHECKING:
    from metier.planning.sharding import OnRank

TRACED = ("activations", "temporaries")
KINDS = ("frozen weights", "fetched weights", "trained weights", "gradients", "optimizer state", *TRACED)
"""Of device memory, in the order in which they are shown. Activations are what is kept for the backward pass;
temporaries what the part of the step makes that has the peak: a layer, or the output layer with the loss; on a CPU
with the holes that it leaves in the heap (`HOLES`)."""
HOLES = 0.06
"""Of the temporaries, where layers are computed again in the backward pass: what is freed on a CPU between blocks that
stay, and fits nothing that comes. The most, in steps of 0.02, with which the errors of those runs of
benchmarks/results/planner.md that are not held out keep to the goals; a few are still foreseen too small."""
DEFAULT_LABELLED_SHARE = 0.5
"""Of a record's tokens, those with a loss, where nobody says it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One run, before it starts."""

    config: RunConfig
    state: TrainingPlan
    trace: StepTrace | None
    """None where the step could not be traced; bytes lack the activations then."""
    why_not_traced: str
    device_bytes: dict[str, int]
    """At the step's peak, by kind (`KINDS`)."""
    host_bytes: int
    """Beside the device's, where that has memory of its own."""
    disk_bytes: int
    base_itemsize: int
    """Bytes of one of the base's numbers as it is loaded."""
    assumptions: tuple[str, ...]
    hidden_size: int = 0
    num_tokens: int = 0
    """Of the batch that was traced, padding included."""
    units: tuple[Unit, ...] = ()
    """What a sharded run would gather at once."""
    on_rank: OnRank | None = None
    """Of one process of several; bytes are that process's then."""
    saved_bytes: int | None = None
    """Of an adapter, as PEFT saves it; None where what is trained is what is saved."""
    base_forward_flops: int | None = None
    """Of the batch through the base alone; None where the delta can be merged, or that was not traced."""
    is_moe: bool = False
    num_virtual_tokens: int | None = 0
    """Of each sequence's KV cache, what the method takes; None where a network beside the base has its own."""

    @property
    def total_device_bytes(self) -> int:
        return sum(self.device_bytes.values())

    @property
    def total_bytes(self) -> int:
        """On the device and on the host."""
        return self.total_device_bytes + self.host_bytes

    @property
    def delta_bytes(self) -> int:
        """Of what is saved: selected experts' rows in the base's dtype, what is trained otherwise as it is trained."""
        if selects_experts(self.config):
            return self.state.num_trained * self.base_itemsize
        return self.state.trained_bytes if self.saved_bytes is None else self.saved_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """What is trained and the optimizer's state, as a checkpoint has them."""
        return self.state.trained_bytes + self.state.optimizer_bytes

    @property
    def added_at_inference(self) -> float | None:
        """Operations that a token takes more than in the base, as a share of the base's; None where it is not traced.

        Nothing once the delta is merged, and for a prompt, whose tokens are read once (`num_virtual_tokens`).
        """
        if method_of(self.config.method).is_free_at_inference:
            return 0.0
        if self.trace is None:
            return None
        if self.config.method != "meft":
            base = self.base_forward_flops
            return None if base is None else max(0.0, self.trace.flops("forward") / base - 1)
        # each token has rows of its own, where a batch's share those of a Key-Expert
        sizes = meft_config(self.config).sizes
        candidates = sizes.num_active_key_experts * (sizes.r // sizes.num_key_experts)
        numbers = sizes.num_key_experts + candidates + sizes.top_k
        added = 2 * self.hidden_size * numbers * len(self.trace.stands_for)
        return added / (self.trace.flops("forward") / self.num_tokens - added)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        traced: dict[str, Any] = {"forward_flops": None, "backward_flops": None, "bytes_moved": None}
        if self.trace is not None:
            traced = {
                "forward_flops": self.trace.flops("forward"),
                "backward_flops": self.trace.flops("backward"),
                "bytes_moved": self.trace.bytes_moved("forward") + self.trace.bytes_moved("backward"),
            }
        return {
            "method": self.config.method,
            "batch_size": self.config.per_device_train_batch_size,
            "num_tokens": self.config.max_length,
            "gradient_checkpointing": self.config.gradient_checkpointing,
            "base_store": self.config.base_store,
            "base_format": self.config.base_format,
            "on_rank": None if self.on_rank is None else self.on_rank.as_dict(),
            "num_trained_parameters": self.state.num_trained,
            "num_frozen_parameters": self.state.num_frozen,
            "device_bytes": {kind.replace(" ", "_"): num_bytes for kind, num_bytes in self.device_bytes.items()},
            "total_device_bytes": self.total_device_bytes,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "delta_bytes": self.delta_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "added_at_inference": self.added_at_inference,
            "num_virtual_tokens": self.num_virtual_tokens,
            **traced,
            "not_traced": self.why_not_traced or None,
            "assumptions": list(self.assumptions),
        }


class Estimator:
    """Says what runs of one model will take; what it has traced it keeps.

    Args:
        base: the model's configuration.
        labelled_share: of the tokens that have a loss. Batches are full: `per_device_train_batch_size` rows of
            `max_length` tokens.
        has_host: the host's memory is not the device's, so that rows in it are copied to the device.
        profile: of the data, by which experts are selected and tokens choose.
        half: of the profile's sequences, the even or the odd ones: how tokens choose on those alone.
        is_padded: full batches have a row that is a token shorter, and so a mask, as nearly all batches have.
    """

    world_size = 1
    """Processes that a run has."""

    def __init__(
        self,
        base: PreTrainedConfig,
        *,
        labelled_share: float = DEFAULT_LABELLED_SHARE,
        has_host: bool = False,
        profile: RoutingProfile | None = None,
        half: int | None = None,
        is_padded: bool = False,
    ) -> None:
        self.profile, self.half, self.is_padded = profile, half, is_padded
        self.base, self.labelled_share, self.has_host = base, labelled_share, has_host
        self._traces: dict[tuple[RunConfig, Batch], StepTrace | str] = {}
        self._states: dict[RunConfig, Estimate] = {}
        self._counted: dict[RunConfig, _Counted] = {}

    def __call__(self, config: RunConfig, batch: Batch | None = None) -> Estimate:
        """What `metier train` with this configuration will take.

        Args:
            config: the run.
            batch: its largest, where that is known.

        Raises:
            MetierError: as `run_skeleton`.
        """
        batch = batch or self._full_batch(config)
        masked = "; its records are not all as long, so attention has a mask" if batch.has_mask else ""
        assumed = f"{batch.labelled_share:.0%} of a batch's tokens have a loss, and it is full{masked}."
        found = self._trace(_on_device(config), batch)
        known = self.without_activations(config)
        if isinstance(found, str):
            return dataclasses.replace(known, why_not_traced=found)
        peak = found.peak()
        so_far = min(peak.num_bytes, _gradients_at(peak, known.state))
        activations = max(0, peak.kept_bytes - so_far)
        temporaries = peak.num_bytes - so_far - activations
        if config.gradient_checkpointing and not self.has_host:
            temporaries += int(HOLES * temporaries)
        device = {**known.device_bytes, "activations": activations, "temporaries": temporaries}
        if config.gradient_accumulation_steps == 1:
            device["gradients"] += so_far
        return dataclasses.replace(
            known,
            trace=found,
            device_bytes=device,
            assumptions=(*known.assumptions, assumed),
            num_tokens=batch.num_rows * batch.num_tokens,
        )

    def _trace(self, config: RunConfig, batch: Batch) -> StepTrace | str:
        """Of a batch of a run whose weights are on the device; or why there is none."""
        if (config, batch) not in self._traces:
            try:
                skeleton = run_skeleton(config, self.base, self.profile)
                chances = self._chances(config, skeleton.selection)[0]
                found = trace_step(
                    config,
                    skeleton,
                    batch,
                    chances=chances,
                    is_reserved=self.has_host,
                    granularity=ALLOCATION_BYTES if self.has_host else 1,
                )
                self._traces[config, batch] = found
            except UnsupportedModelError as error:
                self._traces[config, batch] = str(error)
        return self._traces[config, batch]

    def base_forward_flops(self, config: RunConfig) -> int | None:
        """Of a full batch through the base alone; None where the delta merges, or where that cannot be said."""
        method = method_of(config.method)
        # a model's own loss looks at every position, labelled or not
        if method.is_free_at_inference or config.method == "meft" or method.optimizer == "own_loss":
            return None
        found = self._trace(as_method(_on_device(config), "full"), self._full_batch(config))
        return None if isinstance(found, str) else found.flops("forward")

    def _full_batch(self, config: RunConfig) -> Batch:
        rows = uneven_rows(config) if self.is_padded else "whole"
        return Batch(config.per_device_train_batch_size, config.max_length, self.labelled_share, rows)

    def without_activations(self, config: RunConfig) -> Estimate:
        """The state alone, which is quick: less than the run will take."""
        if config not in self._states:
            self._states[config] = self._state(config)
        return self._states[config]

    def _chances(self, config: RunConfig, selection: ExpertSelection | None) -> tuple[Chances, str]:
        """Of experts to be chosen, and where they are from, in words."""
        if self.profile is None:
            return assumed_chances(config, selection)
        of_a_half = "" if self.half is None else " (one half of it)"
        said = f"Tokens choose experts as in the profile of {self.profile.num_tokens:,} tokens{of_a_half}."
        return chances_of(self.profile, half=self.half), said

    def _gradients(self, config: RunConfig, state: TrainingPlan) -> int:
        """That there are from step to step, or from batch to batch; rows on disk have theirs there too."""
        on_disk = self._gradients_on_disk(config, state)
        kept = state.row_gradient_bytes if config.gradient_accumulation_steps == 1 else state.gradient_bytes
        return kept - on_disk

    def _gradients_on_disk(self, config: RunConfig, state: TrainingPlan) -> int:
        return 0 if config.meft_store != "disk" or self.has_host else state.row_gradient_bytes

    def _count(self, config: RunConfig) -> _Counted:
        """What a run's model says, which is slow to make where it is large."""
        key = _one_batch(config)
        if key not in self._counted:
            skeleton = run_skeleton(key, self.base, self.profile)
            said = (*skeleton.assumptions, self._chances(key, skeleton.selection)[1])
            units = units_of(skeleton.model, bf16=key.bf16, checkpointing=key.gradient_checkpointing)
            model = skeleton.model
            self._counted[key] = _Counted(
                state=skeleton.state(key),
                units=units,
                base_itemsize=model.dtype.itemsize,
                assumptions=said,
                saved_bytes=saved_bytes(model, key.method, density=key.procedure_options.get("density", 1.0)),
                num_virtual_tokens=num_virtual_tokens(model),
                is_moe=_is_moe(model),
            )
        return self._counted[key]

    def _update_buffers(self, config: RunConfig, *, on_cpu: bool) -> int:
        """Of rows and moments that the optimizer gathers."""
        if config.method != "meft":
            return 0
        return buffer_bytes(
            meft_config(config).sizes.r,
            self._hidden_size,
            getattr(torch, config.meft_row_dtype),
            config.meft_state_dtype,
            is_exact=config.meft_update == "exact",
            on_cpu=on_cpu,
        )

    @property
    def _hidden_size(self) -> int:
        hidden_size: int = self.base.get_text_config().hidden_size
        return hidden_size

    def _state(self, config: RunConfig) -> Estimate:
        counted = self._count(config)
        state = counted.state
        is_apart = config.method == "meft" and config.meft_store != "device"
        rows = state.row_bytes + state.row_state_bytes if is_apart else 0
        buffers = self._update_buffers(config, on_cpu=is_apart or not self.has_host)
        on_host = is_apart and self.has_host
        cached = min(config.meft_cache_bytes, rows) if on_host else 0
        cached_rows = cached * state.row_bytes // rows if rows else 0
        stored = state.stored_bytes if config.base_store != "device" else 0
        device = {
            "frozen weights": state.base_bytes
            - stored
            - (state.trained_bytes if method_of(config.method).saves_whole_model else 0)
            + state.fixed_bytes
            + state.kept_bytes,
            "fetched weights": self._fetched_base(config, counted, stored)
            + (state.row_bytes - cached_rows if on_host else buffers)
            # rows that are kept there to be updated there, their moments, and what that gathers
            + (cached + self._update_buffers(config, on_cpu=False) if cached else 0),
            "trained weights": state.trained_bytes - (state.row_bytes if is_apart else 0),
            "gradients": self._gradients(config, state),
            "optimizer state": state.optimizer_bytes - (state.row_state_bytes if is_apart else 0),
            **dict.fromkeys(TRACED, 0),
        }
        return Estimate(
            config=config,
            state=state,
            trace=None,
            why_not_traced="",
            device_bytes=device,
            host_bytes=stored * (config.base_store == "host")
            + rows * (config.meft_store == "host")
            + (buffers if on_host else 0),
            disk_bytes=stored * (config.base_store == "disk")
            + (rows + self._gradients_on_disk(config, state)) * (is_apart and config.meft_store == "disk"),
            base_itemsize=counted.base_itemsize,
            hidden_size=self._hidden_size,
            assumptions=counted.assumptions,
            units=counted.units,
            saved_bytes=counted.saved_bytes,
            num_virtual_tokens=counted.num_virtual_tokens,
            is_moe=counted.is_moe,
        )

    def _fetched_base(self, config: RunConfig, counted: _Counted, stored: int) -> int:
        """Of the frozen base, two layers at a time where it lies elsewhere; a trace has what is read back of them."""
        is_viewed = config.base_store == "host" and not self.has_host
        return 0 if is_viewed else 2 * stored // max(1, len(counted.state.rows) - 1)


@dataclass(frozen=True, slots=True)
class _Counted:
    """Of a run's model, whatever a step's batches are."""

    state: TrainingPlan
    units: tuple[Unit, ...]
    base_itemsize: int
    assumptions: tuple[str, ...]
    saved_bytes: int | None
    num_virtual_tokens: int | None
    is_moe: bool


def _is_moe(model: nn.Module) -> bool:
    try:
        return not is_dense(model)
    except UnsupportedModelError:  # its experts are of a kind that nobody can select
        return True


def _on_device(config: RunConfig) -> RunConfig:
    """Where frozen weights are makes no difference to what is computed; their format, what is read back, does."""
    return _one_batch(dataclasses.replace(config, base_store="device", base_folder=None))


def _one_batch(config: RunConfig) -> RunConfig:
    """The run in one process with one batch a step: neither makes a difference to its model, nor to a batch's trace."""
    return dataclasses.replace(config, gradient_accumulation_steps=1, global_batch_size=None, fsdp=False)


def _gradients_at(peak: Peak, state: TrainingPlan) -> int:
    """Gradients that come and go, at a step's peak: of the layers that the backward pass has behind it."""
    if peak.layer is None:
        return 0
    behind = (row for row in state.rows if row.name != "other" and int(row.name) > peak.layer)
    return sum(row.gradient_bytes - row.row_gradient_bytes for row in behind)
