"""Answers of /v1/chat/completions as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from metier.serving.http.shape import Json, finite
from metier.serving.text import TextToken
from metier.serving.token_spelling import TokenSpelling


class ChatShape:
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, spelling: TokenSpelling, *, has_logprobs: bool) -> None:
        self._spelling = spelling
        self._has_logprobs = has_logprobs

    def opening(self, index: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, tokens: Sequence[TextToken], finish_reason: str | None) -> Json:
        delta = {"content": text} if text or finish_reason is None else {}
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def choice(self, index: int, text: str, tokens: Sequence[TextToken], finish_reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TextToken]) -> Json | None:
        if not self._has_logprobs:
            return None
        content = []
        for token in (text_token.token for text_token in tokens):
            tops = [self._entry(token_id, logprob) for token_id, logprob in token.top_logprobs]
            content.append({**self._entry(token.token_id, token.logprob), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        spelled = self._spelling.spell(token_id)
        raw = None if spelled.bytes is None else list(spelled.bytes)
        return {"token": spelled.text, "logprob": finite(logprob), "bytes": raw}
