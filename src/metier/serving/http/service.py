"""What the endpoints share (engine, tokenizer, limits, counters), and how a request begins and the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from metier.errors import MetierError, RequestError
from metier.serving.contract import SamplingSettings, ServingEngine
from metier.serving.detokenize import Detokenizer, Tokenizer
from metier.serving.http.answers import Answer, Answers
from metier.serving.http.errors import ApiError
from metier.serving.http.front import delta_named
from metier.serving.http.metrics import Metrics
from metier.serving.http.sampling_fields import SamplingRequest
from metier.serving.http.settings import HttpSettings
from metier.serving.prompts import PromptEncoder
from metier.serving.text import AnswerText
from metier.serving.token_spelling import TokenSpelling

TOO_LONG = "context_length_exceeded"


class Service:
    def __init__(self, engine: ServingEngine, tokenizer: Tokenizer, base_name: str, settings: HttpSettings) -> None:
        self.engine = engine
        self.base_name = base_name
        self.settings = settings
        self.encoder = PromptEncoder(tokenizer)
        self.detokenizer = Detokenizer(tokenizer)
        self.spelling = TokenSpelling(tokenizer, self.detokenizer)
        self.metrics = Metrics(engine, base_name)
        self.is_closing = False
        self._closed: asyncio.Task[None] | None = None

    def delta_of(self, model: str) -> str | None:
        """The delta that a request's `model` names; None for the base.

        Raises:
            UnknownDeltaError: there is no such model.
        """
        return delta_named(model, self.base_name, [delta.name for delta in self.engine.deltas()])

    def begin(self, request: SamplingRequest, prompts: Sequence[Sequence[int]]) -> Answers:
        """Submit a request's answers, all or none.

        Raises:
            UnknownDeltaError, RequestError, OverloadedError, EngineError: as `ServingEngine.submit`.
            ApiError: more answers than one request may have, or a prompt that is too long.
        """
        delta = self.delta_of(request.model)
        answers: list[Answer] = []
        try:
            self.check_number(len(prompts) * request.num_answers)
            for prompt in prompts:
                most_tokens = self._most_tokens(prompt, request)
                for _ in range(request.num_answers):
                    settings = self._sampling(request, most_tokens, len(answers))
                    generation = self.engine.submit(prompt, delta=delta, settings=settings)
                    answers.append(Answer(len(answers), generation, AnswerText(self.detokenizer, request.stop)))
        except Exception as error:
            for answer in answers:
                answer.generation.cancel()
            is_refused = isinstance(error, (MetierError, ApiError))
            self.metrics.count_request(request.model, "refused" if is_refused else "failed")
            raise
        return Answers(answers, prompts, request.model, self.metrics)

    async def close(self) -> None:
        """Refuse new requests, let the running ones finish, stop the engine. Asked again it waits for the same end."""
        self.is_closing = True
        if self._closed is None:
            self._closed = asyncio.create_task(self.engine.close(grace_seconds=self.settings.grace_seconds))
        await asyncio.shield(self._closed)

    def check_number(self, num_answers: int) -> None:
        """Raise a RequestError for more answers than one request may have."""
        if num_answers > self.settings.max_n:
            raise RequestError(
                f"n: got {num_answers} answers (prompts times n), expected at most {self.settings.max_n} in one "
                "request.\nAsk in several requests."
            )

    def _most_tokens(self, prompt: Sequence[int], request: SamplingRequest) -> int:
        max_length, max_prompt = self.engine.max_length, self.settings.max_prompt_tokens
        if max_prompt is not None and len(prompt) > max_prompt:
            message = f"The prompt has {len(prompt)} tokens, but this server takes prompts of at most {max_prompt}."
            raise ApiError(400, message, code=TOO_LONG)
        room = max_length - len(prompt)
        if (request.most_tokens or 1) > room:
            answer = "" if request.most_tokens is None else f" and its answer may have {request.most_tokens}"
            raise ApiError(
                400,
                f"The prompt has {len(prompt)} tokens{answer}, but prompt and answer together have at most "
                f"{max_length}. Shorten the prompt or lower max_tokens.",
                code=TOO_LONG,
            )
        return room if request.most_tokens is None else request.most_tokens

    def _sampling(self, request: SamplingRequest, most_tokens: int, index: int) -> SamplingSettings:
        return SamplingSettings(
            max_tokens=most_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            # else all answers would be the same
            seed=None if request.seed is None else request.seed + index,
            num_top_logprobs=request.num_top_logprobs,
            counts_experts=request.shows_experts,
        )
