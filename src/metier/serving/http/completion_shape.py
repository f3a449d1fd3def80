"""Answers of /v1/completions as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from metier.serving.http.shape import Json, finite
from metier.serving.text import TextToken
from metier.serving.token_spelling import TokenSpelling


class CompletionShape:
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, spelling: TokenSpelling, *, has_logprobs: bool, echoes: Sequence[str]) -> None:
        """`echoes`: what stands before each answer's text, by its index; empty for nothing."""
        self._spelling = spelling
        self._has_logprobs = has_logprobs
        self._echoes = echoes

    def opening(self, index: int) -> Json | None:
        return self.piece(index, self._echoes[index], (), None) if self._echoes else None

    def piece(self, index: int, text: str, tokens: Sequence[TextToken], finish_reason: str | None) -> Json:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def choice(self, index: int, text: str, tokens: Sequence[TextToken], finish_reason: str) -> Json:
        echo = self._echoes[index] if self._echoes else ""
        return {
            "index": index,
            "text": echo + text,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TextToken]) -> Json | None:
        if not self._has_logprobs:
            return None
        spell = self._spelling.spell
        return {
            "tokens": [spell(text_token.token.token_id).text for text_token in tokens],
            "token_logprobs": [finite(text_token.token.logprob) for text_token in tokens],
            "top_logprobs": [
                {spell(token_id).text: finite(logprob) for token_id, logprob in text_token.token.top_logprobs}
                for text_token in tokens
            ],
            "text_offset": [text_token.offset for text_token in tokens],
        }
