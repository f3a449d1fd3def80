"""The answers of one request: several generations of the engine as one stream of pieces of text.

Whatever ends the request (its last token, a stop string, an error, a client that left), `close` is called once: it
stops the generations that still run and books the request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from metier.errors import EngineError
from metier.serving.contract import ExpertUse, Finish, Generation
from metier.serving.http.errors import FailedAnswerError
from metier.serving.http.metrics import Metrics, Outcome
from metier.serving.text import AnswerText, TextToken


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    index: int
    text: str
    tokens: tuple[TextToken, ...]
    finish_reason: str | None
    """"stop" or "length" in an answer's last piece."""


class Answer:
    """One generation as text."""

    def __init__(self, index: int, generation: Generation, text: AnswerText) -> None:
        self.index = index
        self.generation = generation
        self.finish: Finish | None = None
        self.num_tokens = 0
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._text = text

    async def pieces(self) -> AsyncGenerator[AnswerPiece, None]:
        """Raises FailedAnswerError or EngineError where the engine ended it before its time."""
        async for token in self.generation:
            if self._text.is_stopped:
                continue  # cancelled, but what it used is known only once it is over
            self.num_tokens += 1
            self.last_token_at = time.perf_counter()
            self.first_token_at = self.first_token_at or self.last_token_at
            piece = self._text.push(token)
            if self._text.is_stopped:
                self.generation.cancel()
            if piece.text or piece.tokens:
                yield AnswerPiece(self.index, piece.text, piece.tokens, None)
        self.finish = self.generation.finish
        assert self.finish is not None, "a generation that is over says how it ended"
        last = self._text.finish()
        reason = "stop" if self._text.is_stopped else self.finish.reason
        if reason == "error":
            raise FailedAnswerError(self.finish.error or "the engine gave no reason")
        if reason == "cancelled":
            raise EngineError("The server is closing and could not finish this answer. Ask again later.")
        yield AnswerPiece(self.index, last.text, last.tokens, reason)


class Answers:
    """All answers of one request, each prompt's `n` after one another."""

    def __init__(self, answers: Sequence[Answer], prompts: Sequence[Sequence[int]], model: str, metrics: Metrics):
        self.model = model
        self.started_at = time.perf_counter()
        self._answers = answers
        self._num_prompt_tokens = sum(map(len, prompts))
        self._num_prompts = len(prompts)
        self._metrics = metrics
        self._has_failed = False
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._answers)

    async def pieces(self) -> AsyncGenerator[AnswerPiece, None]:
        """The pieces of all answers as they come. Raises as `Answer.pieces`, which ends all of them."""
        try:
            async with aclosing(self._merged()) as merged:
                async for piece in merged:
                    yield piece
        except Exception:
            self._has_failed = True
            raise

    async def _merged(self) -> AsyncGenerator[AnswerPiece, None]:
        if len(self._answers) == 1:
            async with aclosing(self._answers[0].pieces()) as pieces:
                async for piece in pieces:
                    yield piece
            return
        queue: asyncio.Queue[AnswerPiece | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(_fill(queue, answer)) for answer in self._answers]
        try:
            num_open = len(tasks)
            while num_open:
                match await queue.get():
                    case None:
                        num_open -= 1
                    case AnswerPiece() as piece:
                        yield piece
                    case error:
                        raise error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _num_cached_tokens(self) -> int:
        """Of each prompt by its first answer: its other answers find in the cache what that one has put there."""
        num_answers_each = len(self._answers) // self._num_prompts
        firsts = self._answers[::num_answers_each]
        return sum(answer.finish.num_cached_tokens for answer in firsts if answer.finish)

    def usage(self) -> dict[str, object]:
        """Tokens so far, in OpenAI's form. A prompt counts once, however many answers it has."""
        num_generated = sum(answer.num_tokens for answer in self._answers)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
        }

    def speed_and_experts(self) -> dict[str, object]:
        """What this server says of an answer beyond OpenAI's schema; the counts of several answers are added up."""
        seconds = time.perf_counter() - self.started_at
        num_tokens = sum(answer.num_tokens for answer in self._answers)
        used = [answer.finish.experts for answer in self._answers if answer.finish and answer.finish.experts]
        return {
            "experts": _added_up(used) if used else None,
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds if seconds > 0 else 0.0,
        }

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for answer in self._answers:
            answer.generation.cancel()
        is_over = all(answer.finish is not None for answer in self._answers)
        outcome: Outcome = "failed" if self._has_failed else "finished" if is_over else "cancelled"
        self._metrics.count_request(self.model, outcome, seconds=time.perf_counter() - self.started_at)
        self._metrics.count_prompt_tokens(self.model, self._num_prompt_tokens, self._num_cached_tokens)
        for answer in self._answers:
            self._book(answer)

    def _book(self, answer: Answer) -> None:
        if answer.first_token_at is None or answer.last_token_at is None:
            return
        self._metrics.count_answer(
            self.model,
            num_tokens=answer.num_tokens,
            to_first_token=answer.first_token_at - self.started_at,
            to_last_token=answer.last_token_at - self.started_at,
        )


async def _fill(queue: asyncio.Queue[AnswerPiece | Exception | None], answer: Answer) -> None:
    try:
        async for piece in answer.pieces():
            queue.put_nowait(piece)
    except Exception as error:
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)


def _added_up(used: Sequence[ExpertUse]) -> dict[str, object]:
    counts = [
        [sum(column) for column in zip(*rows, strict=True)] for rows in zip(*(u.counts for u in used), strict=True)
    ]
    return {
        "layers": list(used[0].layers),
        "counts": counts,
        "replaced": [list(row) for row in used[0].replaced],
    }
