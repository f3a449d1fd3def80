"""The text of an answer as its tokens come: detokenized, cut before the first stop string, nothing leaked.

Text comes later than tokens: while a character is incomplete or a stop string may have begun. A token is given out with
the text that it begins, so that log probabilities stand beside their text, and those of a stop string are never seen.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metier.serving.contract import GeneratedToken
from metier.serving.detokenize import Detokenizer
from metier.serving.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class TextToken:
    token: GeneratedToken
    offset: int
    """Characters of the answer before it."""


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str
    tokens: tuple[TextToken, ...]


class AnswerText:
    """`push` each token of the answer until `is_stopped`, then `finish`."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = ()) -> None:
        self._incremental = detokenizer.begin()
        self._stops = StopStrings(stops)
        self._waiting: list[TextToken] = []
        self._num_decoded = 0
        self._num_given = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come, so that there is nothing more to say."""
        return self._stops.is_found

    def push(self, token: GeneratedToken) -> TextPiece:
        self._waiting.append(TextToken(token, self._num_decoded))
        decoded = self._incremental.push(token.token_id)
        self._num_decoded += len(decoded)
        return self._give(self._stops.push(decoded))

    def finish(self) -> TextPiece:
        """What was held back; without a stop string all tokens that are left, too."""
        text = self._stops.push(self._incremental.finish()) + self._stops.finish()
        piece = self._give(text)
        if self.is_stopped:
            return piece
        left, self._waiting = tuple(self._waiting), []
        return TextPiece(piece.text, piece.tokens + left)

    def _give(self, text: str) -> TextPiece:
        self._num_given += len(text)
        num_tokens = 0
        while num_tokens < len(self._waiting) and self._waiting[num_tokens].offset < self._num_given:
            num_tokens += 1
        tokens, self._waiting = tuple(self._waiting[:num_tokens]), self._waiting[num_tokens:]
        return TextPiece(text, tokens)
