"""What a merged model rightly answers, by transformers' own `generate`; nothing of the server takes part in it.

An answer that hangs on a rounding (another token would come if each logit moved by about NOISE) is none: the soak does
not ask for it, so that every difference it finds is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOISE = 1e-4
TEMPERATURE, TOP_P = 0.8, 0.95
"""Of answers that are drawn."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: a conversation, or a text where `is_chat` is false."""

    number: int
    is_chat: bool
    messages: list[dict[str, str]]
    text: str
    prompt_ids: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Right:
    """A right answer."""

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float]


def right_answer(model, tokenizer, question: Question, *, seed: int | None = None) -> Right | None:
    """What a model says alone, greedily or drawn by a seed; None where it hangs on a rounding."""
    import torch
    from transformers import LogitsProcessorList

    chooser = _Chooser(seed)
    ids = torch.tensor([question.prompt_ids])
    with torch.no_grad():
        # whole, though the embedded model's prompts begin with its padding token
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=question.max_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([chooser]),
        )
        # rounded otherwise: two experts that are nearly as likely may change places
        at_once = model(out[:, :-1], use_cache=False).logits[0, ids.shape[1] - 1 :]
    if chooser.hangs_on_a_rounding or float((at_once - torch.stack(chooser.logits)).abs().max()) > NOISE:
        return None
    tokens = out[0, len(question.prompt_ids) :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends = model.generation_config.eos_token_id
    return Right(tokens, text, "stop" if tokens[-1] in ends else "length", chooser.logprobs)


class _Chooser:
    """A logits processor for one sequence: chooses by a seed, keeps log probabilities, and watches for close calls."""

    def __init__(self, seed: int | None) -> None:
        import torch

        self.logits: list[Any] = []
        self.logprobs: list[float] = []
        self.hangs_on_a_rounding = False
        self._uniform = None if seed is None else torch.Generator().manual_seed(seed)
        self._noise = torch.Generator().manual_seed(0)

    def __call__(self, input_ids, scores):
        import torch

        self.logits.append(scores[0])
        logits = scores[0].double()
        if self._uniform is None:
            (first, second), (token, _) = (found.tolist() for found in logits.topk(2))
            self.hangs_on_a_rounding |= first - second < 10 * NOISE
        else:
            u = torch.rand((), generator=self._uniform, dtype=torch.float64)
            noise = torch.randn(4, len(logits), generator=self._noise, dtype=torch.float64)
            token, *others = _drawn(torch.cat([logits[None], logits + NOISE * noise]), u)
            self.hangs_on_a_rounding |= any(other != token for other in others)
        self.logprobs.append(float(logits.log_softmax(-1)[token]))
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


def _drawn(logits, u) -> list[int]:
    """For each row: on which of the likeliest tokens, TOP_P of the probability in all, a number in [0, 1) falls."""
    probabilities, order = (logits / TEMPERATURE).softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < TOP_P)
    place = (kept.cumsum(-1) <= u * kept.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return order.gather(-1, place).squeeze(-1).tolist()
