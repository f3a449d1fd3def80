"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from metier.serving.http.fields import refused
from metier.serving.http.sampling_fields import HARMLESS, MOST_TOP_LOGPROBS, UNSUPPORTED, SamplingRequest

MAX_TOKENS = 16
"""Where a request does not say, as OpenAI has it."""


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of token ids: always as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(prompt, str) for prompt in value) or all(map(_are_ids, value)):
            return value
        if _are_ids(value):
            return [value]
    raise PydanticCustomError(
        "prompt", "expected a text, a list of texts, a list of token ids, or a list of lists of token ids, none empty"
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token_id) is int for token_id in value)


class CompletionRequest(SamplingRequest):
    harmless: ClassVar[frozenset[str]] = HARMLESS
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {**UNSUPPORTED, "suffix": ("",)}

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def most_tokens(self) -> int:
        return MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.best_of is not None and self.best_of != self.num_answers:
            raise refused("best_of", f"this server gives all answers. Leave it out, or give n, {self.num_answers}.")
        if self.echo and self.logprobs is not None:
            raise refused("echo", "this server has no log probabilities of prompts. Leave echo or logprobs out.")
        return self
