"""What a running request has said so far: from transformers' outputs to tokens, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metier.serving.contract import ExpertUse, Finish, FinishReason, GeneratedToken
from metier.serving.paged_requests import BatchRequest


class Progress:
    """One request's way through the batch."""

    def __init__(self, request: BatchRequest, replaced: Mapping[int, Sequence[int]]) -> None:
        """Args:
        replaced: experts that the request's delta changes, by decoder layer.
        """
        self._request, self._replaced = request, replaced
        self._num_seen = 0

    def new_tokens(self, output: Any) -> list[GeneratedToken]:
        """Tokens that came since the last output."""
        ids: list[int] = output.generated_tokens[self._num_seen :]
        first, self._num_seen = self._num_seen, len(output.generated_tokens)
        if self._request.settings.num_top_logprobs is None:
            return [GeneratedToken(token_id) for token_id in ids]
        draw = self._request.draw
        assert draw is not None, "the request is in the batch"
        return draw.tokens[first : first + len(ids)]

    def finish(self, output: Any) -> Finish:
        """How the request ended, after its last output."""
        if output.error and not self._request.is_cancelled:
            return Finish(reason="error", error=output.error)
        return Finish(
            reason=self._reason(output.generated_tokens),
            num_cached_tokens=self._request.num_cached_tokens,
            experts=self._expert_use() if self._request.settings.counts_experts else None,
        )

    def _reason(self, token_ids: Sequence[int]) -> FinishReason:
        if self._request.is_cancelled:
            return "cancelled"
        return "stop" if token_ids and token_ids[-1] in self._request.eos_token_ids else "length"

    def _expert_use(self) -> ExpertUse:
        layers = tuple(sorted(self._request.counts))
        return ExpertUse(
            layers=layers,
            counts=tuple(tuple(self._request.counts[layer].tolist()) for layer in layers),
            replaced=tuple(tuple(self._replaced.get(layer, ())) for layer in layers),
        )
