"""How surprising a model finds given tokens: the forward passes under held-out loss and the cloze test.

A cloze item asks for several continuations of one context. The context is run once and its key-value cache
shared: with 80 tokens of context and four options of 10 that is a third of the tokens of four whole texts.
"""

# B sequences or contexts, R continuations, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

TOKENS_IN_BATCH = 8_192
LOGITS_IN_BATCH = 1 << 26
"""Bounds the logits of a batch (256 MB in float32) where the vocabulary is large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSequence:
    """Tokens of which those from `start` on are scored, each given all before it; `start` is at least 1."""

    token_ids: tuple[int, ...]
    start: int


def negative_log_likelihoods(model: PreTrainedModel, sequences: Sequence[ScoredSequence]) -> list[float]:
    """-ln p of each sequence's scored tokens, summed, in nats; float32 softmax, float64 sums.

    Sequences are batched by length and padded on the right, which a causal model cannot see. Call it in eval
    mode and without gradients.
    """
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    budget = max(1, min(TOKENS_IN_BATCH, LOGITS_IN_BATCH // vocab_size))
    order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index].token_ids), index))
    totals = [0.0] * len(sequences)
    while order:
        width = len(sequences[order[0]].token_ids)
        batch, order = order[: max(1, budget // width)], order[max(1, budget // width) :]
        for index, total in zip(batch, _score_batch(model, [sequences[index] for index in batch]), strict=True):
            totals[index] = total
    return totals


def _score_batch(model: PreTrainedModel, sequences: Sequence[ScoredSequence]) -> list[float]:
    width = len(sequences[0].token_ids)
    input_ids_BT = torch.zeros((len(sequences), width), dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    is_scored_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        assert 1 <= sequence.start <= len(sequence.token_ids), "a scored token needs a token before it"
        input_ids_BT[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
        attention_mask_BT[row, : len(sequence.token_ids)] = 1
        is_scored_BT[row, sequence.start : len(sequence.token_ids)] = True
    input_ids_BT, is_scored_BT = input_ids_BT.to(model.device), is_scored_BT.to(model.device)
    logits_BTV = model(
        input_ids=input_ids_BT, attention_mask=attention_mask_BT.to(model.device), use_cache=False
    ).logits[:, -width:]  # an adapter's virtual tokens stand before the sequence
    # The logits at a position predict the next token.
    is_target_BT = is_scored_BT[:, 1:]
    losses = F.cross_entropy(
        logits_BTV[:, :-1][is_target_BT].float(), input_ids_BT[:, 1:][is_target_BT], reduction="none"
    )
    losses_BT = torch.zeros(is_target_BT.shape, dtype=torch.float64, device=losses.device)
    losses_BT[is_target_BT] = losses.double()
    return [float(total) for total in losses_BT.sum(dim=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuations:
    """A context and what may follow it; neither the context nor any continuation is empty."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[tuple[int, ...], ...]


def continuation_losses(model: PreTrainedModel, items: Sequence[Continuations]) -> list[list[float]]:
    """-ln p of each continuation given its context, in nats; the same as scoring each text whole.

    Contexts are padded on the left, so that all continuations of a batch start in the same column. Call it in
    eval mode and without gradients.
    """
    if has_prompt(model):
        return _scored_whole(model, items)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    budget = min(TOKENS_IN_BATCH, LOGITS_IN_BATCH // vocab_size)
    order = sorted(range(len(items)), key=lambda index: (-len(items[index].context_ids), index))
    losses: list[list[float]] = [[] for _ in items]
    while order:
        width = len(items[order[0]].context_ids)
        num_taken = num_tokens = 0
        for index in order:
            num_tokens += width + sum(len(ids) for ids in items[index].continuation_ids)
            if num_taken and num_tokens > budget:
                break
            num_taken += 1
        batch, order = order[:num_taken], order[num_taken:]
        scored = iter(_score_continuations(model, [items[index] for index in batch]))
        for index in batch:
            losses[index] = [next(scored) for _ in items[index].continuation_ids]
    return losses


def has_prompt(model: PreTrainedModel) -> bool:
    """Whether an adapter of PEFT puts virtual tokens before all that the model reads, what follows a cache too."""
    active = getattr(model, "active_peft_config", None) if isinstance(model, PeftModel) else None
    return bool(getattr(active, "is_prompt_learning", False))


def _scored_whole(model: PreTrainedModel, items: Sequence[Continuations]) -> list[list[float]]:
    """Each continuation with its context again, where a context cannot be computed once for all of them."""
    sequences = [
        ScoredSequence(token_ids=item.context_ids + ids, start=len(item.context_ids))
        for item in items
        for ids in item.continuation_ids
    ]
    scored = iter(negative_log_likelihoods(model, sequences))
    return [[next(scored) for _ in item.continuation_ids] for item in items]


def _score_continuations(model: PreTrainedModel, items: Sequence[Continuations]) -> list[float]:
    """Losses of all continuations of all items, in order."""
    device = model.device
    context_BT, is_context_BT = _pad([item.context_ids for item in items], on_left=True)
    context_BT, is_context_BT = context_BT.to(device), is_context_BT.to(device)
    keep_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    output = model(
        input_ids=context_BT,
        attention_mask=is_context_BT,
        position_ids=(is_context_BT.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=True,
        **keep_last,
    )
    rows = [(row, ids) for row, item in enumerate(items) for ids in item.continuation_ids]
    owners_R = torch.tensor([row for row, _ in rows], device=device)
    target_RT, is_target_RT = _pad([ids for _, ids in rows], on_left=False)
    target_RT, is_target_RT = target_RT.to(device), is_target_RT.to(device)
    # The context's last logits predict the first token of every continuation.
    first_RV = output.logits[:, -1].float()[owners_R]
    losses_R = F.cross_entropy(first_RV, target_RT[:, 0], reduction="none").double()
    if target_RT.shape[1] > 1:
        cache = output.past_key_values
        cache.batch_select_indices(owners_R)
        steps_T = torch.arange(target_RT.shape[1] - 1, device=device)
        logits_RTV = model(
            input_ids=target_RT[:, :-1],
            attention_mask=torch.cat([is_context_BT[owners_R], is_target_RT[:, :-1]], dim=1),
            position_ids=is_context_BT.sum(dim=1)[owners_R, None] + steps_T,
            past_key_values=cache,
            use_cache=True,
        ).logits
        rest_RT = F.cross_entropy(logits_RTV.float().transpose(1, 2), target_RT[:, 1:], reduction="none")
        losses_R += (rest_RT.double() * is_target_RT[:, 1:]).sum(dim=1)
    return [float(loss) for loss in losses_R]


def _pad(sequences: Sequence[Sequence[int]], *, on_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(sequence) for sequence in sequences)
    ids_BT = torch.zeros((len(sequences), width), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if on_left else slice(0, len(sequence))
        ids_BT[row, place] = torch.tensor(sequence)
        mask_BT[row, place] = 1
    return ids_BT, mask_BT
