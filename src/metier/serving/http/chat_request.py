"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from metier.serving.http.fields import CheckedModel, refused
from metier.serving.http.sampling_fields import HARMLESS, MOST_TOP_LOGPROBS, UNSUPPORTED, SamplingRequest


def _text(content: Any) -> Any:
    """The text of a message: as it is, or in parts, which are joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            got = repr(kind)[:60] if isinstance(kind, str) else "something else"
            raise PydanticCustomError(
                "content",
                "part {index} has type {got}; this server takes parts of type 'text' alone",
                {"index": index, "got": got},
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", "part {index}: expected a text under 'text'", {"index": index})
        texts.append(part["text"])
    return "".join(texts)


class ChatMessage(CheckedModel):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "audio": (),
        "refusal": (),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates want it."""
        message = {"role": self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(SamplingRequest):
    harmless: ClassVar[frozenset[str]] = HARMLESS
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **UNSUPPORTED,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "moderation": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
    }

    # of a million wrong messages the first is told
    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "expected only with logprobs: true.")
        if None not in (both := {self.max_tokens, self.max_completion_tokens}) and len(both) > 1:
            raise refused("max_tokens", "it differs from max_completion_tokens, its new name. Give one of them.")
        return self
