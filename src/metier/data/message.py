"""A message and a record: the one form that every data format is turned into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What one speaker said."""

    role: str
    """One of ROLES."""
    content: str
    """The text; empty where an assistant's message only calls tools."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys for the chat template, e.g. tool_calls, tool_call_id, name, reasoning_content."""

    def to_dict(self) -> dict[str, Any]:
        """The message as chat templates want it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One conversation, or one plain text."""

    messages: tuple[Message, ...]
    """Empty where the record is a plain text."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """JSON schemas of the tools that the assistant may call."""
    origin: str
    """Where it stands, e.g. "train.jsonl:12"."""
    text: str | None = None
    """A plain text, all of it trained on."""
    is_plain: bool = False
    """A prompt and its completion, joined as they are where the tokenizer has no chat template."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the row that the reader asked for, e.g. tests that a reply has to pass."""
