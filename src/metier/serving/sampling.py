"""Draw each request's next token by its own settings, in one batch with all others.

transformers' batch has one temperature and one generator for all. This is the last of its logits processors: it
chooses the token of each row itself, and leaves nothing else for the argmax that follows.
"""

# B rows that get a token, V vocabulary

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from metier.serving.contract import GeneratedToken, SamplingSettings


@dataclass(slots=True)
class Draw:
    """One request's settings, its own random numbers, and what came with its tokens."""

    settings: SamplingSettings
    generator: torch.Generator | None = None
    tokens: list[GeneratedToken] = field(default_factory=list)
    """With their log probabilities, for requests that want them; else empty."""
    has_begun: bool = False
    """Whether a token was drawn."""

    def __post_init__(self) -> None:
        if self.settings.temperature > 0:
            self.generator = torch.Generator()
            if self.settings.seed is None:
                self.generator.seed()
            else:
                # any integer is a seed for OpenAI's clients; torch takes 64 bits
                self.generator.manual_seed(self.settings.seed % 2**63)

    def uniform(self) -> float:
        """The next random number of this request, in [0, 1): the same whoever else is in the batch."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """Chooses tokens, by `draws`: the settings of every running request, by its id."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - as the base class has it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._draws: dict[str, Draw] = {}
        self._lock = threading.Lock()
        self._batch: list[Draw] = []

    def add(self, request_id: str, settings: SamplingSettings) -> Draw:
        draw = Draw(settings)
        with self._lock:
            self._draws[request_id] = draw
        return draw

    def remove(self, request_id: str) -> None:
        with self._lock:
            self._draws.pop(request_id, None)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        with self._lock:
            self._batch = [self._draws[request.state.request_id] for request in requests_with_new_token]
        return torch.zeros(len(self._batch), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """(B, V) → (B, V): where a token was drawn, -inf for all others."""
        draws = self._batch[: len(scores)]
        for draw in draws:
            draw.has_begun = True
        drawn = [row for row, draw in enumerate(draws) if draw.settings.temperature > 0]
        if not drawn and all(draw.settings.num_top_logprobs is None for draw in draws):
            return scores
        chosen_B = scores[: len(draws)].argmax(-1)
        if drawn:
            chosen_B[drawn] = _drawn(scores[drawn], [draws[row] for row in drawn]).to(scores.device)
        self._keep_logprobs(scores, chosen_B, draws)
        if drawn:
            scores = scores.clone()
            tokens = chosen_B[drawn].unsqueeze(-1)
            scores[drawn] = torch.full_like(scores[drawn], -torch.inf).scatter_(-1, tokens, 0.0)
        return scores

    @staticmethod
    def _keep_logprobs(scores_BV: Tensor, chosen_B: Tensor, draws: list[Draw]) -> None:
        rows = [row for row, draw in enumerate(draws) if draw.settings.num_top_logprobs is not None]
        if not rows:
            return
        logprobs_BV = scores_BV[rows].double().log_softmax(-1)
        own_B = logprobs_BV.gather(-1, chosen_B[rows].unsqueeze(-1)).squeeze(-1).tolist()
        most = max(draws[row].settings.num_top_logprobs or 0 for row in rows)
        top = logprobs_BV.topk(min(most, logprobs_BV.shape[-1]), dim=-1)
        chosen, values, ids = chosen_B[rows].tolist(), top.values.tolist(), top.indices.tolist()
        for place, row in enumerate(rows):
            num = draws[row].settings.num_top_logprobs or 0
            pairs = tuple(zip(ids[place][:num], values[place][:num], strict=True))
            draws[row].tokens.append(GeneratedToken(chosen[place], own_B[place], pairs))


def _drawn(scores_BV: Tensor, draws: list[Draw]) -> Tensor:
    """One token a row, (B,) on the CPU: from the likeliest ones that make up `top_p` of the probability."""
    settings = [draw.settings for draw in draws]
    temperature_B1 = torch.tensor([each.temperature for each in settings], dtype=torch.float64).unsqueeze(-1)
    # float64: what a request is answered does not hang on the last bit of a sum over the vocabulary
    scores_BV = scores_BV.cpu().double()
    # the largest becomes 0 first, so that a temperature near 0 makes no infinities
    probs_BV = ((scores_BV - scores_BV.amax(-1, keepdim=True)) / temperature_B1).softmax(-1)
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    sums_BV = sorted_BV.cumsum(-1)
    top_p_B1 = torch.tensor([each.top_p for each in settings], dtype=torch.float64).unsqueeze(-1)
    # a token counts if those before it do not make up top_p yet; the likeliest always does
    num_kept_B = ((sums_BV - sorted_BV) < top_p_B1).sum(-1).clamp_(min=1)
    mass_B = sums_BV.gather(-1, (num_kept_B - 1).unsqueeze(-1)).squeeze(-1)
    uniform_B = torch.tensor([draw.uniform() for draw in draws], dtype=torch.float64)
    place_B = torch.searchsorted(sums_BV, (uniform_B * mass_B).unsqueeze(-1), right=True).squeeze(-1)
    place_B = torch.minimum(place_B, num_kept_B - 1)
    return order_BV.gather(-1, place_B.unsqueeze(-1)).squeeze(-1)
