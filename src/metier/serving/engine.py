"""The engine: one base, its deltas in their tiers, the requests that wait and those that run.

```
submit ──► Admission ──► PagedBatch (a thread of transformers' continuous batching) ──► Answer
              ▲  which may start?          │ tokens of each step
              └── Tiers (a loader thread) ◄┘ who is done with which delta
```

All decisions are made in the event loop's thread; the two other threads hand their results over to it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.errors import DeltaError, EngineError, MetierError, RequestError, ServingError
from metier.serving.admission import Admission
from metier.serving.contract import DeltaStatus, EngineStatus, Finish, GeneratedToken, SamplingSettings
from metier.serving.delta_store import PlacedDelta
from metier.serving.generation import Answer
from metier.serving.outcome import Progress
from metier.serving.paged_batch import PagedBatch
from metier.serving.paged_requests import BatchRequest
from metier.serving.step import NO_DELTA
from metier.serving.tiers import Tiers

_CLOSE_SECONDS = 0.005
"""Between two looks whether all requests are over."""
_BASE_KEY = 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    answer: Answer
    prompt_ids: list[int]
    settings: SamplingSettings


@dataclass(frozen=True, slots=True)
class _Running:
    answer: Answer
    progress: Progress


class Engine:
    """A `ServingEngine`. Made before the event loop runs; from then on all of it belongs to the loop's thread."""

    def __init__(
        self,
        *,
        make_batch: Callable[[Callable[[list[Any]], None]], PagedBatch],
        tiers: Tiers[PlacedDelta],
        max_requests: int,
        max_waiting: int,
        max_length: int,
        num_embeddings: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        """Args:
        make_batch: from what takes the outputs of a step.
        tiers: of which the engine is told by `delta_came` and `delta_failed`.
        max_requests: in one batch.
        max_waiting: requests beside those.
        max_length: most tokens of a prompt and its answer together; the cache may hold fewer.
        num_embeddings: tokens that the model knows.
        eos_token_ids: after any of which an answer is over.
        """
        self._loop: asyncio.AbstractEventLoop | None = None
        self._batch = make_batch(lambda outputs: self._in_loop(self._take, outputs))
        self._tiers = tiers
        self.max_length = min(max_length, self._batch.max_length)
        self._admission = Admission(max_waiting=max_waiting)
        self._num_embeddings = num_embeddings
        self._max_requests, self._eos_token_ids = max_requests, list(eos_token_ids)
        self._waiting: dict[str, _Waiting] = {}
        self._running: dict[str, _Running] = {}
        self._wanted: list[tuple[str, asyncio.Future[None]]] = []
        """Deltas that are to be there, and who waits for it."""
        self._numbers = itertools.count(1)
        self._is_closing = False

    @property
    def cache_tokens(self) -> int:
        """As `PagedBatch.cache_tokens`."""
        return self._batch.cache_tokens

    def start(self) -> None:
        """Begin to run steps."""
        self._batch.start()

    def deltas(self) -> list[DeltaStatus]:
        return self._tiers.deltas()

    def status(self) -> EngineStatus:
        error = self._batch.error or self._tiers.error
        closing = "the server is shutting down" if self._is_closing else None
        return EngineStatus(
            is_alive=self._batch.is_alive and error is None and not self._is_closing,
            error=closing if error is None else repr(error),
            num_running=len(self._running),
            num_waiting=self._admission.num_waiting,
            cache_used=self._batch.cache_used,
            delta_bytes=self._tiers.delta_bytes(),
        )

    def submit(self, prompt_ids: Sequence[int], *, delta: str | None, settings: SamplingSettings) -> Answer:
        """As `ServingEngine.submit`."""
        self._loop = asyncio.get_running_loop()
        self._check_open()
        self._check_length(len(prompt_ids), settings.max_tokens)
        self._check_ids(prompt_ids)
        request_id = f"request-{next(self._numbers)}"
        if delta is not None:
            self._tiers.ask(delta)
        try:
            self._admission.add(request_id, delta)
        except ServingError:
            if delta is not None:
                self._tiers.withdraw(delta)
            raise
        answer = Answer(request_id, delta, self._cancel)
        self._waiting[request_id] = _Waiting(answer, list(prompt_ids), settings)
        self._start_waiting()
        return answer

    async def load_delta(self, name: str, folder: Path, *, is_pinned: bool = False) -> DeltaStatus:
        """As `ServingEngine.load_delta`."""
        self._loop = asyncio.get_running_loop()
        self._check_open()
        return await asyncio.wrap_future(self._tiers.load(name, folder, is_pinned=is_pinned))

    async def unload_delta(self, name: str) -> None:
        """As `ServingEngine.unload_delta`."""
        self._loop = asyncio.get_running_loop()
        await asyncio.wrap_future(self._tiers.unload(name))

    async def bring_delta(self, name: str) -> None:
        """Have a delta on the accelerator, as if a request waited for it; it may make way again once this returns.

        Raises:
            UnknownDeltaError: no delta of that name is served.
            DeltaError: it could not be loaded.
            EngineError: the engine has died or is closing.
        """
        self._loop = asyncio.get_running_loop()
        self._check_open()
        self._tiers.ask(name)
        came: asyncio.Future[None] = self._loop.create_future()
        self._wanted.append((name, came))
        try:
            self._start_waiting()
            self._tell_wanted()
            await came
        finally:
            self._wanted.remove((name, came))
            self._tiers.withdraw(name)

    def send_delta_down(self, name: str) -> None:
        """Take a delta off the accelerator once nobody uses it, unless it is asked for anew before.

        Raises:
            UnknownDeltaError: no delta of that name is served.
        """
        self._tiers.send_down(name)

    async def close(self, *, grace_seconds: float) -> None:
        """As `ServingEngine.close`."""
        self._loop, self._is_closing = asyncio.get_running_loop(), True
        deadline = self._loop.time() + grace_seconds
        while (self._running or self._waiting) and self._batch.is_alive and self._loop.time() < deadline:
            await asyncio.sleep(_CLOSE_SECONDS)
        self._drop_all_waiting(Finish(reason="cancelled"))
        self._fail_wanted(EngineError("the server is shutting down."))
        for request_id in self._running:
            self._batch.cancel(request_id)
        await asyncio.to_thread(self._batch.stop)
        await asyncio.to_thread(self._tiers.close)

    def _start_waiting(self) -> None:
        """Let those begin whose turn it is and whose deltas are there, and have the others' deltas brought."""
        if not self._batch.is_alive:
            self._drop_all_waiting(Finish(reason="error", error=f"the engine has died: {self._batch.error}"))
            return
        with self._tiers.steady() as resident:
            started = self._admission.next(self._max_requests - len(self._running), resident)
            handles = [self._acquire(self._waiting[request_id].answer.delta) for request_id in started]
        for request_id, handle in zip(started, handles, strict=True):
            self._begin(self._waiting.pop(request_id), handle)
        # who is to be there before its first request comes is behind those that requests wait for
        self._tiers.prefetch([*self._admission.waiting_deltas(), *(name for name, _ in self._wanted)])

    def _acquire(self, delta: str | None) -> PlacedDelta | None:
        return None if delta is None else self._tiers.acquire(delta)

    def _begin(self, waiting: _Waiting, handle: PlacedDelta | None) -> None:
        answer = waiting.answer
        request = BatchRequest(
            request_id=answer.request_id,
            prompt_ids=waiting.prompt_ids,
            number=NO_DELTA if handle is None else handle.number,
            key=_BASE_KEY if handle is None else handle.key,
            settings=waiting.settings,
            eos_token_ids=self._eos_token_ids,
        )
        replaced = {} if handle is None else handle.experts
        self._running[answer.request_id] = _Running(answer, Progress(request, replaced))
        try:
            self._batch.add(request)
        except ServingError as error:
            self._leave(answer.request_id, Finish(reason="error", error=str(error)))

    def _take(self, outputs: list[Any]) -> None:
        """Outputs of a step: tokens for their answers, and the ends of some."""
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue
            tokens: list[GeneratedToken] = running.progress.new_tokens(output)
            running.answer.add(tokens)
            if output.is_finished():
                self._leave(output.request_id, running.progress.finish(output))
        self._start_waiting()

    def _leave(self, request_id: str, finish: Finish) -> None:
        """A request is out of the batch: its delta is free of it."""
        running = self._running.pop(request_id)
        if running.answer.delta is not None:
            self._tiers.release(running.answer.delta)
        running.answer.end(finish)

    def _cancel(self, answer: Answer) -> None:
        if answer.request_id in self._waiting:
            self._admission.cancel(answer.request_id)
            self._drop_waiting(answer.request_id, Finish(reason="cancelled"))
            self._start_waiting()
        else:
            self._batch.cancel(answer.request_id)

    def delta_came(self, _: str) -> None:
        """From the loader's thread: requests may acquire a delta."""
        self._in_loop(self._tell_wanted)
        self._in_loop(self._start_waiting)

    def delta_failed(self, name: str, error: DeltaError) -> None:
        """From the loader's thread: a delta could not be loaded."""
        self._in_loop(self._fail, name, error)

    def _fail(self, delta: str, error: DeltaError) -> None:
        """A delta could not be loaded: nobody waits for it any more."""
        for request_id in self._admission.cancel_delta(delta):
            self._drop_waiting(request_id, Finish(reason="error", error=str(error)))
        self._fail_wanted(error, delta)
        self._start_waiting()

    def _tell_wanted(self) -> None:
        """Those that are to be there, and are."""
        with self._tiers.steady() as resident:
            for name, came in self._wanted:
                if name in resident and not came.done():
                    came.set_result(None)

    def _fail_wanted(self, error: MetierError, delta: str | None = None) -> None:
        for name, came in self._wanted:
            if delta in (None, name) and not came.done():
                came.set_exception(error)

    def _drop_all_waiting(self, finish: Finish) -> None:
        for request_id in list(self._waiting):
            self._admission.cancel(request_id)
            self._drop_waiting(request_id, finish)

    def _drop_waiting(self, request_id: str, finish: Finish) -> None:
        waiting = self._waiting.pop(request_id)
        if waiting.answer.delta is not None:
            self._tiers.withdraw(waiting.answer.delta)
        waiting.answer.end(finish)

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        """From another thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *args)

    def _check_open(self) -> None:
        if self._is_closing:
            raise EngineError("the server is shutting down and takes no new requests. Try again later.")
        if not self._batch.is_alive:
            raise EngineError(f"the engine has died: {self._batch.error}. Start the server again.")

    def _check_length(self, num_prompt: int, max_tokens: int) -> None:
        if num_prompt == 0:
            raise RequestError("the prompt has no tokens; expected at least one.")
        if num_prompt + max_tokens > self.max_length:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and the answer may have {max_tokens}, but together they are to be "
                f"{self.max_length} at most. Shorten the prompt, or ask for fewer tokens."
            )

    def _check_ids(self, prompt_ids: Sequence[int]) -> None:
        """One that has no embedding would end the loop, and every request with it."""
        for token_id in (min(prompt_ids), max(prompt_ids)):
            if not 0 <= token_id < self._num_embeddings:
                raise RequestError(
                    f"the prompt has token {token_id}, but the model's are 0 to {self._num_embeddings - 1}. Is the "
                    "tokenizer another model's?"
                )
