"""An engine without a model: answers that are known beforehand, at the pace and with the faults that a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metier.errors import EngineError, UnknownDeltaError
from metier.serving.contract import DeltaStatus, EngineStatus, ExpertUse, Finish, GeneratedToken, SamplingSettings


@dataclass
class FakeGeneration:
    engine: FakeEngine
    delta: str | None
    prompt_ids: list[int]
    settings: SamplingSettings
    finish: Finish | None = None
    is_cancelled: bool = False
    num_given: int = 0

    def cancel(self) -> None:
        self.is_cancelled = self.is_cancelled or self.finish is None

    async def __aiter__(self) -> AsyncIterator[GeneratedToken]:
        engine, settings = self.engine, self.settings
        token_ids = engine.tokens_of(engine.reply(self))
        for token_id in token_ids[: settings.max_tokens]:
            await asyncio.sleep(engine.token_seconds)
            while self._is_held():
                await asyncio.sleep(0.002)
            if engine.raise_after == self.num_given:
                raise RuntimeError("secret of the engine")
            if engine.fail_after == self.num_given:
                self.finish = Finish(reason="error", error="secret of the engine")
                return
            if self.is_cancelled or engine.is_closed:
                break
            self.num_given += 1
            yield self._token(token_id)
        is_cut = len(token_ids) > settings.max_tokens
        reason: Any = "cancelled" if self.is_cancelled or engine.is_closed else "length" if is_cut else "stop"
        self.finish = Finish(reason=reason, num_cached_tokens=engine.num_cached_tokens, experts=self._experts())

    def _is_held(self) -> bool:
        hold_after = self.engine.hold_after
        is_over = self.is_cancelled or self.engine.is_closed
        return hold_after is not None and self.num_given >= hold_after and not is_over

    def _token(self, token_id: int) -> GeneratedToken:
        if self.settings.num_top_logprobs is None:
            return GeneratedToken(token_id)
        tops = tuple((token_id + rank, -0.5 - rank) for rank in range(self.settings.num_top_logprobs))
        return GeneratedToken(token_id, -0.5, tops)

    def _experts(self) -> ExpertUse | None:
        if not self.settings.counts_experts:
            return None
        counts = ((self.num_given, 2, 0), (1, 0, len(self.prompt_ids)))
        return ExpertUse(layers=(1, 3), counts=counts, replaced=((0,), (0, 2)))


@dataclass
class FakeEngine:
    """Answers `Answer of DELTA.`, or what `reply` says."""

    tokenizer: Any
    names: list[str] = field(default_factory=lambda: ["law", "medicine"])
    max_length: int = 512
    reply: Callable[[FakeGeneration], str] = lambda generation: f"Answer of {generation.delta or 'the base'}."
    token_seconds: float = 0.0
    hold_after: int | None = None
    """Tokens after which answers wait until this is None again."""
    fail_after: int | None = None
    raise_after: int | None = None
    submit_error: Exception | None = None
    num_cached_tokens: int = 0
    died_of: str | None = None
    load_error: Exception | None = None
    is_closed: bool = False
    grace_seconds: float | None = None
    generations: list[FakeGeneration] = field(default_factory=list)
    loaded: list[tuple[str, Path, bool]] = field(default_factory=list)

    def tokens_of(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def deltas(self) -> list[DeltaStatus]:
        return [
            DeltaStatus(
                name=name,
                folder=Path("/srv/deltas") / name,
                kind="esft",
                tier="host" if name == "law" else "accelerator",
                num_bytes=1000,
                is_pinned=False,
                num_running=sum(g.delta == name and g.finish is None for g in self.generations),
                created=1_700_000_000,
            )
            for name in self.names
        ]

    def status(self) -> EngineStatus:
        return EngineStatus(
            is_alive=self.died_of is None,
            error=self.died_of,
            num_running=self.num_running,
            num_waiting=3,
            cache_used=0.25,
            delta_bytes={"accelerator": 1000, "host": 1000, "disk": 0},
        )

    @property
    def num_running(self) -> int:
        return sum(generation.finish is None and not generation.is_cancelled for generation in self.generations)

    def submit(self, prompt_ids: Sequence[int], *, delta: str | None, settings: SamplingSettings) -> FakeGeneration:
        if self.submit_error is not None:
            raise self.submit_error
        if self.is_closed:
            raise EngineError("the engine is closing")
        self.generations.append(FakeGeneration(self, delta, list(prompt_ids), settings))
        return self.generations[-1]

    async def load_delta(self, name: str, folder: Path, *, is_pinned: bool = False) -> DeltaStatus:
        if self.load_error is not None:
            raise self.load_error
        self.loaded.append((name, folder, is_pinned))
        self.names.append(name)
        return self.deltas()[-1]

    async def unload_delta(self, name: str) -> None:
        if name not in self.names:
            raise UnknownDeltaError(f"no delta {name!r} is served")
        self.names.remove(name)

    async def close(self, *, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        end = asyncio.get_running_loop().time() + grace_seconds
        while self.num_running and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.005)
        self.is_closed = True
