"""`metier plan`: what runs of one model will take, side by side, in one process or several, and which of them fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from transformers import PreTrainedConfig

from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.distributed.parting import for_ranks
from metier.distributed.ranks import Ranks
from metier.errors import ConfigError, MetierError, SelectionError, UnsupportedModelError
from metier.methods.from_catalogue import NeedsWeightsError
from metier.models.load import ignore_renamed_options
from metier.models.skeleton import model_config
from metier.planning.as_method import as_method
from metier.planning.budget import machine_budget
from metier.planning.clock import Clock, DeviceClock, clock_here
from metier.planning.devices import Device, device_of
from metier.planning.estimate import Estimate, Estimator
from metier.planning.fit import Budget, Change, Estimates, changed, shown_value, smallest_change
from metier.planning.kv_cache import KvCache, kv_cache
from metier.planning.length import planned_steps
from metier.planning.links import World
from metier.planning.measured import ON_DENSE, ON_MOE, Comparison
from metier.planning.pays import Pays, where_sharding_pays
from metier.planning.sharding import DDP, FSDP2, RankEstimator
from metier.planning.spelling import duration, size
from metier.planning.step_time import StepTime, moved_bytes, step_time
from metier.planning.table import LONG, MOST_COLUMNS, added_cache_bytes, shown
from metier.routing.routing_profile import RoutingProfile

METHODS = ("esft", "expert_lora", "lora", "meft", "full")
"""That are unlike in what they take, and were measured beside each other most; any of the catalogue can be planned."""


@dataclass(frozen=True, slots=True)
class Spread:
    """From the least to the most that a run takes when tokens choose as on all of a profile's data or a half of it."""

    device_bytes: tuple[int, int]
    seconds: tuple[float, float] | None

    def __str__(self) -> str:
        said = f"{size(self.device_bytes[0])} to {size(self.device_bytes[1])} on the device"
        if self.seconds is None:
            return said
        return f"{said}, {duration(self.seconds[0])} to {duration(self.seconds[1])} a step"


@dataclass(frozen=True, slots=True)
class Row:
    """One run of a plan."""

    config: RunConfig
    estimate: Estimate | None
    why_not: str = ""
    """Why this run cannot be at all, or cannot be said."""
    lacking_bytes: int = 0
    change: Change | None = None
    spread: Spread | None = None
    """Where there is a profile."""
    time: StepTime | None = None
    """None where it is not known what computes, or the step could not be traced."""
    way: str | None = None
    """How several processes part it (`sharding.DDP`, `sharding.FSDP2`)."""
    link_seconds: float | None = None
    """To send what a step sends, if nothing is computed meanwhile; None where no link is named."""
    setting: str = ""
    """What its run has otherwise than others of the plan with its method."""
    is_open: bool = False
    """Whether nothing is known of it before more is said: it begins from the weights, or lacks an option."""

    @property
    def name(self) -> str:
        """The method, what is set otherwise than in others of it, and how it is parted."""
        return " ".join(part for part in (self.config.method, self.setting, self.way) if part)

    @property
    def fits(self) -> bool:
        return self.estimate is not None and self.estimate.trace is not None and not self.lacking_bytes

    @property
    def verdict(self) -> str:
        """Whether it fits, in a word or two."""
        if self.fits:
            return "yes"
        cannot_be = self.estimate is None and not self.is_open
        return "no" if self.lacking_bytes or cannot_be else "not known"


@dataclass(frozen=True, slots=True)
class Plan:
    """What several runs of one model will take."""

    budget: Budget
    rows: tuple[Row, ...]
    why_no_time: str = ""
    was_busy: bool = False
    """The machine, while its seconds were measured."""
    device: str | None = None
    """An accelerator by whose figures the seconds are, not this machine."""
    kv_cache: KvCache | None = None
    """Of the model when it generates; None where its configuration does not say it."""
    world: World | None = None
    """The processes of the run, where they are said; bytes are those of one of them then."""
    pays: tuple[Pays, ...] = ()
    """Of each method, from how many processes on it fits."""
    num_records: int | None = None
    """Of the task, if they are said."""

    def seconds_in_all(self, row: Row) -> float | None:
        """Of a run's training; None where its length or a step's time is not known."""
        steps = planned_steps(row.config, self.num_records, 1 if self.world is None else self.world.size)
        return None if row.time is None or steps is None else steps * row.time.seconds

    def moved_bytes(self, estimate: Estimate) -> dict[str, int]:
        """Between tiers of memory, in a step."""
        free_bytes = self.budget.free_bytes(estimate)
        return moved_bytes(estimate, has_host=self.budget.host_bytes is not None, free_bytes=free_bytes)

    @property
    def recommended(self) -> Row | None:
        """Of those that fit, the method with the highest score where we measured; None where no such one fits."""
        methods = self.measured.methods
        return max(self._compared, key=lambda row: methods[row.config.method].share, default=None)

    @property
    def _compared(self) -> list[Row]:
        """Of each method that fits and was measured the first row: on other parts than it usually goes on, none was."""
        found: dict[str, Row] = {}
        for row in self.rows:
            config = row.config
            is_usual = config.targets is None and "target_modules" not in config.method_options
            if row.fits and is_usual and config.method in self.measured.methods:
                found.setdefault(config.method, row)
        return list(found.values())

    @property
    def measured(self) -> Comparison:
        """Where methods were compared on a model of the kind that this one is."""
        return ON_MOE if any(row.estimate is not None and row.estimate.is_moe for row in self.rows) else ON_DENSE

    @property
    def level(self) -> list[Row]:
        """Others that fit, and were not told apart from the best method; the least memory first."""
        best, methods = self.recommended, self.measured.methods
        found = [row for row in self._compared if row is not best and methods[row.config.method].is_level]
        return sorted(found, key=lambda row: 0 if row.estimate is None else row.estimate.total_bytes)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Of all runs, each once."""
        return tuple(dict.fromkeys(said for row in self.rows if row.estimate for said in row.estimate.assumptions))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "device_memory_bytes": self.budget.device_bytes,
            "host_memory_bytes": self.budget.host_bytes,
            "runtime_bytes": self.budget.runtime_bytes,
            "recommended": self.recommended.config.method if self.recommended else None,
            "kv_cache": None if self.kv_cache is None else _cache_as_dict(self.kv_cache),
            "not_timed": self.why_no_time or None,
            "machine_was_busy": self.was_busy,
            "device": self.device,
            "world_size": None if self.world is None else self.world.size,
            "sharding_pays": {pays.method: pays.as_dict() for pays in self.pays},
            "runs": [_row_as_dict(row, self) for row in self.rows],
        }

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    def __rich__(self) -> Group:
        return shown(self)


def plan(
    config: RunConfig | Sequence[RunConfig],
    *,
    methods: Sequence[str] | None = None,
    device_memory: str | None = None,
    host_memory: str | None = None,
    labelled_share: float = 0.5,
    device: str | None = None,
    profile: RoutingProfile | None = None,
    world: World | None = None,
    num_records: int | None = None,
    refused: Mapping[str, str] | None = None,
    begun: Callable[[str], None] | None = None,
) -> Plan:
    """What a run takes, or the runs of several methods.

    Args:
        config: the run, or several of one model; neither its data nor the model's weights need be there.
        methods: to compare instead of a single run's own; settings that belong to one method are left out for others.
            Of more than a table has columns for, no changes are looked for that would make one fit.
        device_memory, host_memory: such as "24GiB"; this machine's where they are not given.
        labelled_share: of the tokens that have a loss, in (0, 1].
        profile: of the data that will be trained on: which experts are selected, and how tokens choose.
        device: an accelerator (`devices.DEVICES`), whose memory counts where `device_memory` is not given.
        world: the processes of the run; bytes and seconds are those of one of them then, with copies of the weights and
            with shards, or with shards alone where the run says `fsdp`.
        num_records: of the task, from which the number of steps follows where the run has no `max_steps`.
        refused: methods that cannot have the runs' keys, and why; each has a row that says so.
        begun: is told the name of each method as its turn comes.

    Raises:
        ConfigError: a size, a method or a device that is none.
        ModelError: the model's configuration cannot be read.
    """
    if not 0 < labelled_share <= 1:
        raise ConfigError(f"labelled_share: must be in (0, 1], got {labelled_share}.")
    if num_records is not None and num_records < 1:
        raise ConfigError(f"records: must be at least 1, got {num_records}.")
    runs = [config] if isinstance(config, RunConfig) else list(config)
    if not runs or (methods is not None and len(runs) > 1):
        raise ConfigError(f"plan: got {len(runs)} runs, expected at least one, and one alone where methods are named.")
    config = runs[0]
    if len({(run.model, run.revision, run.trust_remote_code) for run in runs}) > 1:
        raise ConfigError("plan: got runs of several models, expected runs of one. Plan each model by itself.")
    for method in methods or ():
        method_of(method)
    ignore_renamed_options()
    wanted = None if device is None else device_of(device)

    def budget_of(size: int) -> Budget:
        in_a_node = 1 if world is None else min(size, world.devices_per_node)
        return machine_budget(device_memory, host_memory, wanted, in_a_node=in_a_node)

    budget = budget_of(1 if world is None else world.size)
    clock = _clock(config, budget, wanted)
    base = model_config(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    has_host = budget.host_bytes is not None
    options: dict[str, Any] = {"labelled_share": labelled_share, "has_host": has_host, "is_padded": True}
    estimator = Estimator(base, profile=profile, **options)
    own_halves = [Estimator(base, profile=profile, half=half, **options) for half in (0, 1)] if profile else []
    halves: Sequence[Estimates] = own_halves
    configs, impossible = _configs(runs, methods)
    impossible += [_impossible(config, method, why) for method, why in (refused or {}).items()]
    pays: list[Pays | None] = []
    alone, few = len(configs) + len(impossible) == 1, len(configs) <= MOST_COLUMNS
    settings = _settings(configs)
    if world is None:
        rows = [
            dataclasses.replace(_row(each, budget, estimator, Ranks(), alone=alone, few=few), setting=settings[each])
            for each in _one_by_one(configs, begun)
        ]
    else:
        rows = [
            dataclasses.replace(_rank_row(each, budget, estimator, world, few=few), setting=settings[one])
            for one in _one_by_one(configs, begun)
            for each in _ways(one)
        ]
        for each in configs:
            found = where_sharding_pays(each, estimator, budget_of, world.size)
            name = " ".join(part for part in (each.method, settings[each]) if part)
            pays.append(None if found is None else dataclasses.replace(found, method=name))
        halves = [RankEstimator(half, world.size) for half in own_halves]
    rows = [_timed(_with_base(row, estimator), halves, clock, budget) for row in rows]
    rows = sorted([*rows, *impossible], key=lambda row: (methods or ()).index(row.config.method) if methods else 0)
    if clock is not None:
        clock.save()
    why = "" if clock is not None else "what computes is not this machine's CPU. Name it: --device rtx-4090."
    was_busy, known = clock is not None and clock.was_busy, tuple(each for each in pays if each is not None)
    return Plan(budget, tuple(rows), why, was_busy, device, _cache(base, config), world, known, num_records)


def why_not(config: RunConfig, memory: str | None = None) -> str:
    """Why a run does not fit into memory, or cannot be at all; "" where it fits, or where that cannot be said.

    Args:
        config: the run; its data are not read.
        memory: such as "8GiB"; this machine's where it is not given.
    """
    ignore_renamed_options()
    budget = machine_budget(memory)
    base = model_config(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    try:
        found = Estimator(base, has_host=budget.host_bytes is not None)(for_ranks(config, Ranks()))
    except NeedsWeightsError:
        return ""
    except MetierError as error:
        return str(error).splitlines()[0]
    lacking = budget.lacking_bytes(found)
    return f"it needs {size(lacking)} more than there is" if lacking else ""


def _clock(config: RunConfig, budget: Budget, device: Device | None) -> Clock | None:
    """Of the device that is named, or of this machine where the memory is its own."""
    if device is not None:
        return DeviceClock(device)
    if (budget.host_bytes is not None) != torch.cuda.is_available():
        return None
    return clock_here(config)


def _timed(row: Row, halves: Sequence[Estimates], clock: Clock | None, budget: Budget) -> Row:
    """With its step's time, where it is known what computes, and with its spread, where there is a profile."""
    if row.estimate is None or row.estimate.trace is None:
        return row
    try:
        found = [row.estimate, *(estimator(row.config) for estimator in halves)]
    except SelectionError:  # a half has no tokens: there is no spread
        found = [row.estimate]
    times = [] if clock is None else [step_time(one, clock, free_bytes=budget.free_bytes(one)) for one in found]
    spread = None
    if len(found) > 1:
        sizes, seconds = [one.total_device_bytes for one in found], [time.seconds for time in times]
        spread = Spread((min(sizes), max(sizes)), (min(seconds), max(seconds)) if seconds else None)
    return dataclasses.replace(row, time=times[0] if times else None, spread=spread)


def _cache(base: PreTrainedConfig, config: RunConfig) -> KvCache | None:
    dtype = getattr(base.get_text_config(), "dtype", None) if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        return kv_cache(base, dtype=dtype or torch.float32)
    except UnsupportedModelError:
        return None


def _cache_as_dict(cache: KvCache) -> dict[str, int]:
    return {
        "token_bytes": cache.token_bytes,
        "long_token_bytes": cache.long_token_bytes,
        f"bytes_at_{LONG}_tokens": cache.bytes_for(LONG),
    }


def _configs(runs: list[RunConfig], methods: Sequence[str] | None) -> tuple[list[RunConfig], list[Row]]:
    """The runs to plan, and rows of methods that the run cannot have."""
    if methods is None:
        return runs, []
    found, impossible = [], []
    for method in methods:
        try:
            found.append(as_method(runs[0], method))
        except ConfigError as error:
            if len(methods) == 1:
                raise
            impossible.append(_impossible(runs[0], method, str(error).splitlines()[0]))
    return found, impossible


def _impossible(config: RunConfig, method: str, why: str) -> Row:
    plain = RunConfig(model=config.model, dataset=config.dataset, output_dir=config.output_dir, method=method)
    return Row(plain, None, f"it cannot have this run's keys: {why}")


def _settings(configs: Sequence[RunConfig]) -> dict[RunConfig, str]:
    """Of each run the keys in which it differs from others of its method, in words."""
    keys = {config: {**dataclasses.asdict(config), **config.method_options} for config in configs}
    found = {}
    for config, own in keys.items():
        others = [keys[one] for one in configs if one.method == config.method]
        names = [name for name in own if any(other.get(name) != own[name] for other in others)]
        found[config] = " ".join(f"{name} {shown_value(own[name])}" for name in names if name != "method_options")
    return found


def _with_base(row: Row, estimator: Estimator) -> Row:
    """With what the base alone would take, where the delta cannot be merged into it."""
    if row.estimate is None or row.estimate.trace is None:
        return row
    flops = estimator.base_forward_flops(row.config)
    return dataclasses.replace(row, estimate=dataclasses.replace(row.estimate, base_forward_flops=flops))


def _one_by_one(configs: Sequence[RunConfig], begun: Callable[[str], None] | None) -> Iterator[RunConfig]:
    for config in configs:
        if begun is not None:
            begun(config.method)
        yield config


def _row(
    config: RunConfig, budget: Budget, estimator: Estimates, ranks: Ranks, *, alone: bool, few: bool = True
) -> Row:
    in_all = config.global_batch_size
    try:
        config = for_ranks(config, ranks)
    except ConfigError as error:
        if alone:
            raise
        return Row(config, None, str(error).splitlines()[0])
    try:
        found = estimator(config)
    except MetierError as error:
        if alone:
            raise
        return Row(config, None, str(error).splitlines()[0], is_open=isinstance(error, NeedsWeightsError | ConfigError))
    lacking = budget.lacking_bytes(found)
    is_asked = few and lacking and found.trace is not None
    change = smallest_change(config, budget, estimator) if is_asked else None
    if change is not None and in_all is not None:
        # from which the batches of a step follow
        keys = {key: value for key, value in change.keys.items() if key != "gradient_accumulation_steps"}
        change = dataclasses.replace(change, keys=keys)
    return Row(config, found, found.why_not_traced, lacking, change)


def _ways(config: RunConfig) -> list[RunConfig]:
    """The run with copies of the weights and with shards, or as it says itself."""
    if config.fsdp or config.has_frozen_base:
        return [config]
    return [changed(config, {"fsdp": sharded}) for sharded in (False, True)]


def _rank_row(config: RunConfig, budget: Budget, estimator: Estimator, world: World, *, few: bool) -> Row:
    """Of one process; what a run in so many refuses is refused here in its words."""
    way = FSDP2 if config.fsdp else DDP
    row = _row(config, budget, RankEstimator(estimator, world.size), Ranks(size=world.size), alone=False, few=few)
    on_rank = None if row.estimate is None else row.estimate.on_rank
    seconds = None if on_rank is None else world.seconds(on_rank.sent_bytes)
    return dataclasses.replace(row, way=way, link_seconds=seconds)


def _row_as_dict(row: Row, plan: Plan) -> dict[str, Any]:
    known = {} if row.estimate is None else row.estimate.as_dict()
    cache = None if row.estimate is None else added_cache_bytes(plan, row.estimate)
    return {
        "method": row.config.method,
        "setting": row.setting or None,
        "way": row.way,
        "batches_a_step": row.config.gradient_accumulation_steps,
        **known,
        f"added_cache_bytes_at_{LONG}_tokens": cache,
        "moved_bytes": None if row.estimate is None or row.estimate.trace is None else plan.moved_bytes(row.estimate),
        **({} if row.time is None else row.time.as_dict()),
        "seconds_in_all": plan.seconds_in_all(row),
        "link_seconds": row.link_seconds,
        "spread": None if row.spread is None else dataclasses.asdict(row.spread),
        "fits": row.fits,
        "lacking_bytes": row.lacking_bytes,
        "why_not": row.why_not or None,
        "fits_with": None if row.change is None else row.change.keys,
    }
