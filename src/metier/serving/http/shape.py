"""What differs between the two generating endpoints: how an answer is written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from metier.serving.text import TextToken

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has not; as OpenAI does."""


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(LEAST_LOGPROB, logprob)


class Shape(Protocol):
    """How one endpoint writes its choices."""

    id_prefix: str
    whole_object: str
    """`object` of a whole answer."""
    chunk_object: str
    """`object` of a stream's chunks."""

    def opening(self, index: int) -> Json | None:
        """The choice that begins a stream of answer `index`; None where nothing is to be said before its text."""

    def piece(self, index: int, text: str, tokens: Sequence[TextToken], finish_reason: str | None) -> Json:
        """A choice of a stream."""

    def choice(self, index: int, text: str, tokens: Sequence[TextToken], finish_reason: str) -> Json:
        """A choice of a whole answer."""
