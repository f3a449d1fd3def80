"""Before a server answers anybody: does the batch say of the base what the base says by itself?

The batch lays requests end to end, and each layer's attention asks the cache whose keys are whose. A model whose
attention does not ask (code of its own, a bias or a state that the batch does not know of) would read its neighbours'
tokens and answer all the same. Which models those are no configuration says, so each base is tried.
"""

# S tokens of one sequence, V vocabulary

from __future__ import annotations

import queue
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from metier.deltas.probe import TOLERANCES, logits_of, probe_tokens
from metier.serving.contract import GeneratedToken, SamplingSettings
from metier.serving.paged_batch import BatchLimits, PagedBatch, unsupported
from metier.serving.paged_requests import BatchRequest

_PROMPT_TOKENS = (40, 24)
_NUM_TOKENS = 4
"""Of each answer."""
_LIMITS = BatchLimits(max_requests=2, max_batch_tokens=32, cache_tokens=128)
"""So that the longer prompt is read in two parts, one of them beside the other prompt."""
_NUM_TOP = 20


def base_self_test(model: PreTrainedModel) -> float:
    """Compare what a small batch says with what the model says. Nobody else may use the model meanwhile.

    Returns:
        the difference of two log probabilities, as a share of the largest logit, at the middle one of the places that
        are compared: in an MoE model rounding may send a token to another expert, but not half of them.

    Raises:
        UnsupportedModelError: the difference is larger than rounding explains, or the batch cannot run the model.
    """
    longest = probe_tokens(model).shape[1] - _NUM_TOKENS
    prompts = [
        row[: min(size, longest)].tolist() for row, size in zip(probe_tokens(model), _PROMPT_TOKENS, strict=False)
    ]
    pairs = zip(prompts, _answers(model, prompts), strict=True)
    difference = median(each for prompt, answer in pairs for each in _differences(model, prompt, answer))
    tolerance = TOLERANCES[model.dtype]
    if not difference <= tolerance:
        raise unsupported(
            model,
            f"its log probabilities in a batch differ from its own by {difference:.1e} of the largest logit, where "
            f"{tolerance:.0e} counts as rounding",
        )
    return difference


def _answers(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[GeneratedToken]]:
    outputs: queue.Queue[list[Any]] = queue.Queue()
    batch = PagedBatch(model, _LIMITS, outputs.put)
    settings = SamplingSettings(max_tokens=_NUM_TOKENS, temperature=0, num_top_logprobs=_NUM_TOP)
    requests = [
        BatchRequest(request_id=str(place), prompt_ids=ids, number=0, key=0, settings=settings, eos_token_ids=[])
        for place, ids in enumerate(prompts)
    ]
    batch.start()
    try:
        for request in requests:
            batch.add(request)
        num_left = len(requests)
        while num_left:
            for output in outputs.get():
                if output.error:
                    raise unsupported(model, f"it fails in a batch ({output.error:.200})")
                num_left -= output.is_finished()
    finally:
        batch.stop()
    return [request.draw.tokens for request in requests if request.draw is not None]


def _differences(model: PreTrainedModel, prompt: list[int], answer: list[GeneratedToken]) -> list[float]:
    """Of each token's likeliest, the largest difference to what the model says by itself."""
    token_ids = [*prompt, *(token.token_id for token in answer[:-1])]
    logits_SV = logits_of(model, torch.tensor([token_ids]))[0, len(prompt) - 1 :].double()
    differences = []
    for logits_V, token in zip(logits_SV, answer, strict=True):
        ids, logprobs = zip(*token.top_logprobs, strict=True)
        own = logits_V.log_softmax(-1)[list(ids)]
        difference = (own - torch.tensor(logprobs).double()).abs().nan_to_num(nan=torch.inf).max()
        differences.append(float(difference / logits_V.abs().max()))
    return differences
