"""A run plans before it starts: what cannot fit is refused, and what it will take stands beside what it took."""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedConfig

from metier.config import POLICIES, RunConfig
from metier.data.encode import IGNORED, Item
from metier.distributed.ranks import Ranks
from metier.errors import RunError
from metier.memory.allocator import give_back_what_is_free, is_left_alone
from metier.memory.memory_limit import held_bytes, memory_limit_bytes
from metier.memory.process_memory import ProcessMemory
from metier.methods.from_catalogue import NeedsWeightsError
from metier.methods.wrap import selects_experts
from metier.planning.budget import machine_budget, workspace_bytes
from metier.planning.clock import clock_here
from metier.planning.estimate import TRACED, Estimate, Estimator
from metier.planning.fit import Estimates, changed, smallest_change
from metier.planning.length import num_steps
from metier.planning.machine import fingerprint
from metier.planning.sharding import RankEstimator
from metier.planning.spelling import size
from metier.planning.step import Batch, Rows, uneven_rows
from metier.planning.step_time import step_time
from metier.routing.routing_profile import RoutingProfile
from metier.training.callbacks import peak_memory_bytes, reset_peak_memory
from metier.training.folder import RunFolder

OVER_PREDICTED = 0.09
"""By so much of what was foreseen a run takes less at most, those of a few hundred megabytes left out:
benchmarks/results/planner.md."""
KEPT = 0.09
"""Of all else, what is freed and kept between batches of different lengths, where glibc's own variables are set: of 330
runs of benchmarks/comparisons/embedded half are then foreseen within 3.1%, and 95% within 7%; without it they held
up to 16% more."""
MEASURING_BYTES = 512 << 20
"""That have to be free for operations to be measured."""


class Foresight:
    """What a run will take, known twice: its state before anything is loaded, its largest batch once there are data.

    Args:
        config: the run.
        base: the model's configuration.
        force: say nothing of what does not fit.
        ranks: the processes of the run; those of one machine share its memory.
        is_sharded: they share the weights out among themselves: their state is known, the step's peak is not.
    """

    def __init__(
        self,
        config: RunConfig,
        base: PreTrainedConfig,
        *,
        force: bool,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        is_sharded: bool = False,
    ) -> None:
        self.config, self.force, self.ranks, self.is_sharded = config, force, ranks, is_sharded
        # what a former run of the process has left is no part of this one
        gc.collect()
        give_back_what_is_free()
        reset_peak_memory()
        self.budget = machine_budget(in_a_node=ranks.local_size)
        # where there is one memory it is the process's that is measured
        self._workspace_bytes = 0 if torch.cuda.is_available() else workspace_bytes()
        self._own_bytes = 0 if torch.cuda.is_available() else peak_memory_bytes()
        self._peak_before = 0
        self.warning = ""
        """What a run that may begin should be told: that by what is foreseen it does not fit."""
        self._estimator = Estimator(base, has_host=self.budget.host_bytes is not None)
        self._estimates: Estimates = self._estimator
        if is_sharded:
            # the launcher's configuration may shard where the run's own does not say it
            self.config = changed(config, {"fsdp": True})
        if ranks.size > 1:
            self._estimates = RankEstimator(self._estimator, ranks.size)

    def before_loading(self) -> None:
        """Refuse a run whose weights, gradients and optimizer state alone are too much, or a process's share of them.

        Raises:
            RunError: they are.
        """
        if not self.force:
            with suppress(NeedsWeightsError):
                found = self._estimates.without_activations(_at_least(self.config))
                self._check(found)
                self._check_disk(found)

    def before_training(
        self,
        items: Sequence[Item],
        selection: Path | None,
        profile: RoutingProfile | None = None,
        *,
        steps_done: int = 0,
    ) -> dict[str, float | str]:
        """What the largest batch will take, for plan.json; where that cannot be said, why not.

        Args:
            items: the records that are trained on.
            selection: the file of the run's selection, if it has one.
            profile: of the records, if they were profiled.
            steps_done: of a run that is resumed.

        Raises:
            RunError: it does not fit.
        """
        if self.is_sharded:
            return {"not_traced": "a shard of the weights is not traced; metier plan --world-size says what one takes."}
        self._estimator.profile = profile
        try:
            found = self._estimates(_with_selection(self.config, selection), largest_batch(items, self.config))
        except NeedsWeightsError as error:
            return {"not_traced": str(error)}
        if found.trace is None:
            return {"not_traced": found.why_not_traced}
        if not self.force:
            self._check(found, may_be_wrong=OVER_PREDICTED)
        times = self._times(found.config, items, steps_done)
        own_bytes = self._workspace_bytes + max(self._own_bytes, _held_beside_base(found))
        # no run gives back then what it has freed
        keeps_freed = not torch.cuda.is_available() and is_left_alone()
        measured_bytes = found.total_device_bytes if torch.cuda.is_available() else found.total_bytes
        kept_bytes = int(KEPT * (measured_bytes + own_bytes)) if keeps_freed else 0
        if not self.force:
            self.warning = self._warning(found, kept_bytes)
        return {
            "activation_bytes": sum(found.device_bytes[kind] for kind in TRACED),
            "peak_memory_bytes": measured_bytes + own_bytes + kept_bytes,
            "workspace_bytes": self._workspace_bytes,
            "kept_freed_bytes": kept_bytes,
            "forward_flops": found.trace.flops("forward"),
            "backward_flops": found.trace.flops("backward"),
            **times,
        }

    def peak_memory_bytes(self) -> int:
        """The run's, so far."""
        return max(self._peak_before, peak_memory_bytes())

    def _times(self, config: RunConfig, items: Sequence[Item], steps_done: int) -> dict[str, float | str]:
        """Seconds of a mean step and of all that are left; what the machine is not known to take is measured for it."""
        if memory_limit_bytes() - held_bytes() < MEASURING_BYTES:
            return {"not_timed": f"less than {size(MEASURING_BYTES)} of memory are free, which to measure takes."}
        clock = clock_here(self.config)
        if clock is None:
            return {"not_timed": f"the figures of {torch.cuda.get_device_name()} are not known here."}
        peak = peak_memory_bytes()
        found = self._estimator(config, mean_batch(items, config))
        timed = step_time(found, clock, free_bytes=self.budget.free_bytes(found))
        if clock.save():
            # what was measured with is no part of the run
            give_back_what_is_free()
            reset_peak_memory()
            self._peak_before = peak
        steps = num_steps(math.ceil(len(items) / self.ranks.size), self.config)
        return {
            "step_seconds": timed.seconds,
            "train_seconds": timed.seconds * max(0, steps - steps_done),
            "bottleneck": timed.bottleneck,
            "operation_seconds": timed.operation_seconds,
            "in_a_step": timed.in_a_step,
            # what an accelerator took says nothing of its host's CPU
            "machine": "" if torch.cuda.is_available() else fingerprint(),
            "machine_was_busy": clock.was_busy,
        }

    def _warning(self, estimate: Estimate, kept_bytes: int) -> str:
        budget = dataclasses.replace(self.budget, runtime_bytes=self.budget.runtime_bytes + kept_bytes)
        lacking = budget.lacking_bytes(estimate)
        if not lacking:
            return ""
        return (
            f"Memory may not be enough: {size(lacking)} are lacking of {size(self._needed(estimate) + kept_bytes)}, "
            f"which may be foreseen up to {OVER_PREDICTED:.0%} too large. {self._advice()}"
        )

    def _needed(self, estimate: Estimate) -> int:
        return estimate.total_bytes + self.budget.runtime_bytes

    def _advice(self) -> str:
        change = smallest_change(self.config, self.budget, self._estimates)
        return f"It fits with {change}." if change is not None else "See what does: metier plan --method all."

    def _check(self, estimate: Estimate, *, may_be_wrong: float = 0.0) -> None:
        if self.budget.fits(estimate, may_be_wrong=may_be_wrong):
            return
        lacking = self.budget.lacking_bytes(estimate)
        needed = {**estimate.device_bytes, "rows and stored weights on the host": estimate.host_bytes}
        parts = ", ".join(f"{size(num_bytes)} of {kind}" for kind, num_bytes in needed.items() if num_bytes)
        raise RunError(
            f"{self.config.model}: the run needs at least {size(self._needed(estimate))}, {size(lacking)} more than "
            f"there is: {parts}, and {size(self.budget.runtime_bytes)} of the process itself.\n{self._advice()} Or run "
            "it all the same with --force."
        )

    def _check_disk(self, estimate: Estimate) -> None:
        """Refuse a run whose delta, one checkpoint and rows alone are more than its disk has room for."""
        config = self.config
        stored = estimate.state.stored_bytes if config.base_store == "disk" else 0  # in `base_folder`
        rows = estimate.disk_bytes - stored
        checkpoint = 0 if config.save_steps is None else estimate.checkpoint_bytes
        needed = {"its delta": estimate.delta_bytes, "a checkpoint": checkpoint, "a sparse adapter's rows": rows}
        place = Path(config.output_dir).absolute()
        free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free
        # what a killed run has left is written over
        free += sum(file.stat().st_blocks * 512 for file in RunFolder(place).rows.rglob("*") if file.is_file())
        if sum(needed.values()) <= free:
            return
        parts = ", ".join(f"{size(num_bytes)} for {name}" for name, num_bytes in needed.items() if num_bytes)
        raise RunError(
            f"output_dir: {config.output_dir} is on a disk with {size(free)} free, expected at least {parts}.\nMake "
            "room, name a folder on another disk, or run it all the same with --force."
        )


def _held_beside_base(found: Estimate) -> int:
    """What the process has taken for code and records by now; 0 where that is not what is measured."""
    if torch.cuda.is_available() or not ProcessMemory.is_known():
        return 0
    gc.collect()
    give_back_what_is_free()
    with closing(ProcessMemory()) as memory:
        held, _ = memory.held_and_peak_bytes()
    on_disk = found.state.stored_bytes if found.config.base_store == "disk" else 0
    return held - (found.state.base_bytes - on_disk)


def _at_least(config: RunConfig) -> RunConfig:
    """With one expert a layer where the task decides how many there are: a run is not refused on a guess."""
    if not selects_experts(config) or config.selection is not None:
        return config
    if config.select_top_k is not None or config.select_top_fraction is not None:
        return config
    return changed(config, {**dict.fromkeys(POLICIES), "select_top_k": 1})


def _with_selection(config: RunConfig, selection: Path | None) -> RunConfig:
    if selection is None:
        return config
    asked = {"minus_general": False, "profile_until_stable": False}
    return changed(config, {**dict.fromkeys(POLICIES), **asked, "selection": str(selection)})


def largest_batch(items: Sequence[Item], config: RunConfig) -> Batch:
    """What the batch with the longest record takes, the others in it being as most are.

    Padded, every row is as long as that record; without padding there are so many such rows as the others fill.
    """
    num_rows = min(config.per_device_train_batch_size, len(items))
    longest = max(len(item.input_ids) for item in items)
    labelled = fmean(sum(label != IGNORED for label in item.labels) for item in items)
    if config.padding_free:
        tokens = fmean(len(item.input_ids) for item in items)
        return Batch(1 + math.ceil((num_rows - 1) * tokens / longest), longest, labelled / tokens, _rows(items, config))
    return Batch(num_rows, longest, labelled / longest, _rows(items, config))


def mean_batch(items: Sequence[Item], config: RunConfig) -> Batch:
    """A batch of as many tokens as the mean one, with as many labels."""
    num_rows = min(config.per_device_train_batch_size, len(items))
    num_tokens = max(1, round(mean_tokens(items, config) / num_rows))
    labelled = fmean(sum(label != IGNORED for label in item.labels) for item in items)
    return Batch(num_rows, num_tokens, min(1.0, labelled / num_tokens), _rows(items, config))


def _rows(items: Sequence[Item], config: RunConfig) -> Rows:
    """How batches have their rows, unless all records are as long."""
    if len({len(item.input_ids) for item in items}) == 1:
        return "whole"
    return uneven_rows(config)


def mean_tokens(items: Sequence[Item], config: RunConfig) -> float:
    """Of a batch, padding included, where batches are drawn at random."""
    num_rows = min(config.per_device_train_batch_size, len(items))
    lengths = [len(item.input_ids) for item in items]
    if config.padding_free:
        return num_rows * fmean(lengths)
    # a batch is as long as its longest record: how likely each is to be that, the shorter ones being drawn from before
    of_all = math.comb(len(lengths), num_rows)
    longest = (math.comb(number, num_rows - 1) / of_all for number in range(len(lengths)))
    return num_rows * sum(share * length for share, length in zip(longest, sorted(lengths), strict=True))
