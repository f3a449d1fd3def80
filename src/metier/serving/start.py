"""Start an engine: load the base and try it in a batch, part the memory, put the deltas into service, test each one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metier.errors import ConfigError, DeltaError
from metier.memory.allocator import keep_memory
from metier.memory.collector import keep_objects
from metier.memory.openmp import end_workers
from metier.models.load import load
from metier.models.moe import is_dense, moe_layers
from metier.serving.base_self_test import base_self_test
from metier.serving.budgets import Budgets, budgets
from metier.serving.delta_source import read_served_delta
from metier.serving.delta_store import DeltaStore, PlacedDelta
from metier.serving.engine import Engine
from metier.serving.model_facts import model_facts
from metier.serving.paged_batch import BatchLimits, PagedBatch
from metier.serving.residency import Residency
from metier.serving.self_test import self_test
from metier.serving.tiers import Tiers

_MOST_DELTAS = 4096
"""On the accelerator at once: rows of each layer's index table."""
_POSITIONS = 4096
"""Of a model that does not say how many it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    device_memory_bytes: int | None = None
    delta_memory_bytes: int | None = None
    cache_tokens: int | None = None
    max_batch_tokens: int = 512
    """Of one step. More make prompts quicker, and answers that run meanwhile slower."""
    max_requests: int = 64
    """In one batch."""
    max_waiting: int = 1024
    tests_deltas: bool = True
    pinned: tuple[str, ...] = ()
    """Deltas that stay on the accelerator."""

    def __post_init__(self) -> None:
        least = {"device_memory_bytes": 1, "delta_memory_bytes": 0, "cache_tokens": 1, "max_batch_tokens": 1}
        for name, minimum in {**least, "max_requests": 1, "max_waiting": 1}.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{name}: got {value}, expected at least {minimum}.")


@dataclass(frozen=True, slots=True)
class Started:
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    budgets: Budgets
    differences: dict[str, float]
    """What each delta's self-test found, as a share of the largest logit."""


def start_engine(
    model: str, deltas: Mapping[str, Path], *, dtype: str = "auto", settings: EngineSettings | None = None
) -> Started:
    """A running engine with its deltas in service.

    Args:
        model: a folder, a hub id, or "embedded".
        deltas: folders by name.
        dtype: of the base.

    Raises:
        ModelError: the base cannot be loaded, or not served.
        DeltaError: a delta is damaged, of another base, or not one that can be served; or its self-test fails.
        ServingError: it does not all fit.
    """
    settings = settings or EngineSettings()
    keep_memory()
    loaded = load(model, dtype=dtype)
    base = loaded.model.eval().requires_grad_(False)
    keep_objects()
    facts = model_facts(base, loaded.source)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None) or _POSITIONS
    parted = budgets(
        base,
        device_memory_bytes=settings.device_memory_bytes,
        delta_memory_bytes=settings.delta_memory_bytes,
        cache_tokens=settings.cache_tokens,
        most_tokens=settings.max_requests * positions,
    )
    store = DeltaStore(
        base,
        [] if is_dense(base) else moe_layers(base),
        accelerator_bytes=parted.delta_bytes,
        most_deltas=_MOST_DELTAS,
    )
    base_self_test(base)
    arrivals = _Arrivals()
    tiers = Tiers(
        facts=facts,
        store=store,
        residency=Residency(accelerator_bytes=parted.delta_bytes, host_bytes=parted.host_bytes),
        on_resident=arrivals.came,
        on_failed=arrivals.failed,
        pins_host_memory=base.device.type == "cuda",
    )
    try:
        differences = {}
        for name, folder in deltas.items():
            tiers.load(name, folder, is_pinned=name in settings.pinned).result()
            if settings.tests_deltas:
                with arrivals.using(tiers, name) as placed:
                    differences[name] = self_test(base, read_served_delta(folder, facts=facts), placed.number, name)
        arrivals.engine = engine = _engine(base, tiers, settings, cache_tokens=parted.cache_tokens, positions=positions)
    except BaseException:
        tiers.close()
        raise
    end_workers()  # of this thread, which computes no more
    engine.start()
    parted = replace(parted, cache_tokens=engine.cache_tokens)
    return Started(engine, loaded.tokenizer, parted, differences)


def _engine(
    base: PreTrainedModel, tiers: Tiers[PlacedDelta], settings: EngineSettings, *, cache_tokens: int, positions: int
) -> Engine:
    limits = BatchLimits(
        max_requests=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
        cache_tokens=cache_tokens,
        fewer_will_do=settings.cache_tokens is None,
    )
    return Engine(
        make_batch=lambda on_outputs: PagedBatch(base, limits, on_outputs),
        tiers=tiers,
        max_requests=settings.max_requests,
        max_waiting=settings.max_waiting,
        max_length=positions,
        num_embeddings=len(base.get_input_embeddings().weight),
        eos_token_ids=_eos_token_ids(base),
    )


class _Arrivals:
    """Who is told that a delta has come: the start itself, until there is an engine."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._errors: dict[str, DeltaError] = {}
        self._changed = threading.Condition()

    def came(self, name: str) -> None:
        if self.engine is not None:
            self.engine.delta_came(name)
        with self._changed:
            self._changed.notify_all()

    def failed(self, name: str, error: DeltaError) -> None:
        if self.engine is not None:
            self.engine.delta_failed(name, error)
        with self._changed:
            self._errors[name] = error
            self._changed.notify_all()

    @contextmanager
    def using(self, tiers: Tiers[PlacedDelta], name: str) -> Iterator[PlacedDelta]:
        """A delta on the accelerator, for which others make way if they must."""
        tiers.ask(name)
        with self._changed:
            tiers.prefetch([name])
            placed = self._changed.wait_for(lambda: self._acquired(tiers, name))
        assert placed is not None, "waited for without a limit"
        try:
            yield placed
        finally:
            tiers.release(name)
            tiers.prefetch([])

    def _acquired(self, tiers: Tiers[PlacedDelta], name: str) -> PlacedDelta | None:
        if name in self._errors:
            raise self._errors[name]
        with tiers.steady() as resident:
            return tiers.acquire(name) if name in resident else None


def _eos_token_ids(model: PreTrainedModel) -> list[int]:
    config = model.generation_config
    found = config.eos_token_id if config is not None else None
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)
