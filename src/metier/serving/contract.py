"""What the HTTP side and the engine say to each other; torch-free, so that either is tested without the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Tier = Literal["accelerator", "host", "disk"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How one answer is drawn."""

    max_tokens: int
    """Most tokens of the answer, at least 1."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Share of the probability that is drawn from, in (0, 1]."""
    seed: int | None = None
    """The same seed, prompt and delta give the same answer; None draws anew each time."""
    num_top_logprobs: int | None = None
    """How many of the likeliest tokens come with each token's own log probability; None for no log probabilities."""
    counts_experts: bool = False
    """Whether the experts that the answer used are counted."""


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    token_id: int
    logprob: float | None = None
    """Natural logarithm of its probability by the model, temperature and top_p aside; None unless asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log probabilities, likeliest first."""


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """Which experts one answer used, prompt included."""

    layers: tuple[int, ...]
    """Decoder layers that have routed experts."""
    counts: tuple[tuple[int, ...], ...]
    """How often each expert was used, a row a layer."""
    replaced: tuple[tuple[int, ...], ...]
    """Which experts of each layer are the delta's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """How an answer ended."""

    reason: FinishReason
    error: str | None = None
    """What went wrong, for the log; with reason "error" alone."""
    num_cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were found in the cache."""
    experts: ExpertUse | None = None


class Generation(Protocol):
    """One answer as it comes. `finish` is there once the iteration is over."""

    finish: Finish | None

    def __aiter__(self) -> AsyncIterator[GeneratedToken]: ...

    def cancel(self) -> None:
        """Stop it; the iteration ends soon. Nothing happens if it is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaStatus:
    """A delta that the engine serves."""

    name: str
    folder: Path
    kind: str
    """`esft`, `expert_lora` or `lora`."""
    tier: Tier
    num_bytes: int
    """Of its rows, as they lie on the accelerator."""
    is_pinned: bool
    num_running: int
    """Requests in the batch that use it."""
    created: int
    """When it was put into service, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    is_alive: bool
    error: str | None
    """What the engine died of."""
    num_running: int
    num_waiting: int
    cache_used: float
    """Share of the KV cache's blocks that are taken, in [0, 1]."""
    delta_bytes: dict[Tier, int]
    """Bytes of deltas in each tier."""


class DeltaService(Protocol):
    """The deltas of one base that are in service. All of it is called from the event loop's thread."""

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its answer together."""

    def deltas(self) -> list[DeltaStatus]: ...

    def status(self) -> EngineStatus: ...

    async def load_delta(self, name: str, folder: Path, *, is_pinned: bool = False) -> DeltaStatus:
        """Put a delta into service, whole or not at all. Its files are checked; running requests go on meanwhile.

        Raises:
            DeltaError: the name is taken, or as `read_delta` and `check_fingerprint`.
            ServingError: its rows are more than any budget holds.
        """

    async def unload_delta(self, name: str) -> None:
        """Take a delta out of service: new requests are refused at once, running ones finish.

        Raises:
            UnknownDeltaError: no delta of that name is served.
        """


class ServingEngine(DeltaService, Protocol):
    """One base and its deltas, which answers."""

    def submit(self, prompt_ids: Sequence[int], *, delta: str | None, settings: SamplingSettings) -> Generation:
        """Begin an answer; `delta` None is the base's own.

        Raises:
            UnknownDeltaError: no delta of that name is served.
            RequestError: prompt and answer are longer than `max_length` or than the cache holds.
            OverloadedError: too many requests wait already.
            EngineError: the engine has died or is closing.
        """

    async def close(self, *, grace_seconds: float) -> None:
        """Refuse new requests, let the running ones finish for so long, then stop."""
