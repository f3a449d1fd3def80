"""`metier plan`: what runs of one model will take, side by side, and which of them fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig

from metier.config import RunConfig
from metier.errors import ConfigError, MetierError, UnsupportedModelError
from metier.memory.memory_limit import held_bytes, memory_limit_bytes
from metier.models.skeleton import model_config
from metier.planning.estimate import KINDS, Estimate, Estimator
from metier.planning.fit import BY_SCORE, Budget, Change, changed, read_bytes, smallest_change
from metier.planning.kv_cache import KvCache, kv_cache

METHODS = ("esft", "expert_lora", "lora", "meft", "full")


WORKSPACE_BYTES = 54 << 20
"""What training takes on a CPU beside its tensors, whatever its size: code of kernels, their buffers, what is freed and
not yet given back. The median of benchmarks/results/planner.md, runs that are held out left out."""
LONG = 32_768
"""Tokens of the sequence for which the KV cache is shown."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run of a plan."""

    config: RunConfig
    estimate: Estimate | None
    why_not: str = ""
    """Why this run cannot be at all, or cannot be said."""
    lacking_bytes: int = 0
    change: Change | None = None

    @property
    def fits(self) -> bool:
        return self.estimate is not None and self.estimate.trace is not None and not self.lacking_bytes

    @property
    def verdict(self) -> str:
        """Whether it fits, in a word or two."""
        if self.fits:
            return "yes"
        return "no" if self.lacking_bytes or self.estimate is None else "not known"


@dataclass(frozen=True, slots=True)
class Plan:
    """What several runs of one model will take."""

    budget: Budget
    rows: tuple[Row, ...]
    kv_cache: KvCache | None = None
    """Of the model when it generates; None where its configuration does not say it."""

    @property
    def recommended(self) -> Row | None:
        """Of those that fit, the method with the highest score where we measured."""
        fitting = sorted((r for r in self.rows if r.fits), key=lambda row: BY_SCORE.index(row.config.method))
        return fitting[0] if fitting else None

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
            "runs": [_row_as_dict(row) for row in self.rows],
        }

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    def __rich__(self) -> Group:
        return Group(self._table(), *self._remarks())

    def _table(self) -> Table:
        table = Table(title=self._title(), title_justify="left")
        table.add_column("at the peak of a step")
        for row in self.rows:
            table.add_column(row.config.method, justify="right")
        cells = [_cells(row) for row in self.rows]
        for number, name in enumerate(_LINES):
            table.add_row(
                name, *(column[number] for column in cells), end_section=name in ("trained", KINDS[-1], "disk")
            )
        return table

    def _title(self) -> str:
        memory = f"{size(self.budget.device_bytes)} of memory"
        if self.budget.host_bytes is not None:
            memory = f"{size(self.budget.device_bytes)} on the device, {size(self.budget.host_bytes)} on the host"
        runtime = f"; {size(self.budget.runtime_bytes)} of it is the process's own"
        return f"{self.rows[0].config.model}: {memory}{runtime if self.budget.runtime_bytes else ''}"

    def _remarks(self) -> Iterable[Text]:
        best = self.recommended
        if best is not None:
            yield Text(f"{best.config.method} fits, and had the highest score of what fits where we measured.")
            deltas = {row.config.method: row.estimate.delta_bytes for row in self.rows if row.fits and row.estimate}
            smallest = min(deltas, key=lambda method: deltas[method])
            if smallest != best.config.method:
                yield Text(f"The smallest delta is that of {smallest}: {size(deltas[smallest])}.")
        for row in self.rows:
            name = row.config.method
            if row.change is not None:
                total = row.change.estimate.total_device_bytes + self.budget.runtime_bytes
                yield Text(f"{name} fits with {row.change}: {size(total)}.")
            elif row.lacking_bytes:
                yield Text(f"{name} lacks {size(row.lacking_bytes)}; no change that is known here makes it fit.")
            elif row.why_not:
                yield Text(f"{name}: {row.why_not}")
        if self.kv_cache is not None:
            yield Text(_cache_in_words(self.kv_cache))
        yield from (Text(f"Assumed: {assumption}", style="dim") for assumption in self.assumptions)


def plan(
    config: RunConfig,
    *,
    methods: Sequence[str] | None = None,
    device_memory: str | None = None,
    host_memory: str | None = None,
    labelled_share: float = 0.5,
) -> Plan:
    """What a run takes, or the runs of several methods.

    Args:
        config: the run; neither its data nor the model's weights need be there.
        methods: to compare instead of the run's own; settings that belong to one method are left out for others.
        device_memory, host_memory: such as "24GiB"; this machine's where they are not given.
        labelled_share: of the tokens that have a loss, in (0, 1].

    Raises:
        ConfigError: a size or a method that is none.
        ModelError: the model's configuration cannot be read.
    """
    if not 0 < labelled_share <= 1:
        raise ConfigError(f"labelled_share: must be in (0, 1], got {labelled_share}.")
    for method in methods or ():
        if method not in METHODS:
            raise ConfigError(f"method: got {method!r}, expected some of {', '.join(METHODS)}, or all.")
    budget = machine_budget(device_memory, host_memory)
    base = model_config(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    estimator = Estimator(base, labelled_share=labelled_share, has_host=budget.host_bytes is not None)
    configs = [config] if methods is None else [_as_method(config, method) for method in methods]
    rows = tuple(_row(wanted, budget, estimator, alone=len(configs) == 1) for wanted in configs)
    return Plan(budget, rows, _cache(base, config))


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


def _cache_in_words(cache: KvCache) -> str:
    """Of every method alike: none that `metier plan` knows makes a sequence longer."""
    kinds = ", ".join(dict.fromkeys(str(layer) for layer in cache.layers))
    return (
        f"When it generates, whatever the method, the KV cache ({kinds}) takes {size(cache.token_bytes)} a token, "
        f"{size(cache.bytes_for(LONG))} for a sequence of {LONG:,}."
    )


def _row(config: RunConfig, budget: Budget, estimator: Estimator, *, alone: bool) -> Row:
    try:
        found = estimator(config)
    except MetierError as error:
        if alone:
            raise
        return Row(config, None, str(error).splitlines()[0])
    lacking = budget.lacking_bytes(found)
    change = smallest_change(config, budget, estimator) if lacking and found.trace is not None else None
    return Row(config, found, found.why_not_traced, lacking, change)


def machine_budget(device_memory: str | None = None, host_memory: str | None = None) -> Budget:
    """The memory that is given, such as "24GiB", or else this machine's.

    Raises:
        ConfigError: a size that is none.
    """
    has_device = torch.cuda.is_available()
    if device_memory is not None:
        device = read_bytes(device_memory, "device_memory")
    elif has_device:
        device = torch.cuda.get_device_properties(0).total_memory
    else:
        device = memory_limit_bytes()
    host = None if host_memory is None else read_bytes(host_memory, "host_memory")
    if host is None and has_device:
        host = memory_limit_bytes()
    # on a device the runtime's share is not known here
    return Budget(device, host, 0 if host is not None else held_bytes() + WORKSPACE_BYTES)


def _as_method(config: RunConfig, method: str) -> RunConfig:
    """The run with another method; what only another method has goes back to its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    foreign: set[str] = set()
    if method not in ("esft", "expert_lora"):
        foreign |= {name for name in defaults if name.startswith(("select", "train_", "top_p", "minus_general"))}
    if method in ("full", "lora"):
        foreign |= {"base_store", "base_format", "base_folder"}
    reset = {name: defaults[name] for name in foreign if name in defaults}
    return changed(config, {"method": method, **reset})


_LINES = ("trained", *KINDS, "device", "host", "disk", "delta", "TFLOPs", "fits")
"""Of the table, from top to bottom."""


def _cells(row: Row) -> list[str]:
    found = row.estimate
    if found is None:
        return [*["–"] * (len(_LINES) - 1), row.verdict]
    trace = found.trace
    return [
        count(found.state.num_trained),
        *("–" if kind == "activations" and trace is None else size(found.device_bytes[kind]) for kind in KINDS),
        f"{'> ' if trace is None else ''}{size(found.total_device_bytes)}",
        size(found.host_bytes),
        size(found.disk_bytes),
        size(found.delta_bytes),
        "–" if trace is None else f"{(trace.flops('forward') + trace.flops('backward')) / 1e12:,.3g}",
        row.verdict,
    ]


def _row_as_dict(row: Row) -> dict[str, Any]:
    known = {} if row.estimate is None else row.estimate.as_dict()
    return {
        "method": row.config.method,
        **known,
        "fits": row.fits,
        "lacking_bytes": row.lacking_bytes,
        "why_not": row.why_not or None,
        "fits_with": None if row.change is None else row.change.keys,
    }


def count(number: int) -> str:
    """Of parameters, three digits."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 999.5 * unit else f"{number / unit:,.0f}{name}"
    return str(number)


def size(num_bytes: int) -> str:
    """In binary units, three digits."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}" if num_bytes else "0"
        amount /= 1024
    return f"{amount:,.3g} TiB"
