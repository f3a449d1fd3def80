"""The fields that both of OpenAI's generating endpoints have."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from metier.serving.http.fields import CheckedModel, refused

MOST_STOPS = 4
MOST_STOP_CHARS = 1000
"""Each answer of a request follows them anew."""
MOST_TOP_LOGPROBS = 20
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    # of other servers, which clients send as `extra_body`
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


def _stops(value: Any) -> Any:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise PydanticCustomError("stop", "expected a text that is not empty, or a list of such texts")
    if len(stops) > MOST_STOPS:
        raise PydanticCustomError("stop", f"got {len(stops)} texts, expected at most {MOST_STOPS}")
    longest = max(map(len, stops), default=0)
    if longest > MOST_STOP_CHARS:
        raise PydanticCustomError("stop", f"got a text of {longest} characters, expected at most {MOST_STOP_CHARS}")
    return tuple(stops)


class StreamOptions(CheckedModel):
    harmless: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class MetierOptions(CheckedModel):
    """What this server can say beyond OpenAI's schema."""

    experts: bool = False
    """Which experts the answer used, and how fast it was."""


class SamplingRequest(CheckedModel):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metier: MetierOptions | None = None

    @property
    def num_answers(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage; a whole answer always has it."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def shows_experts(self) -> bool:
        return self.metier is not None and self.metier.experts

    @property
    @abstractmethod
    def num_top_logprobs(self) -> int | None:
        """How many of the likeliest tokens stand beside each; None for no log probabilities."""

    @property
    @abstractmethod
    def most_tokens(self) -> int | None:
        """Most tokens of an answer; None for as many as the model takes."""

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "expected only with stream: true.")
        return self
