"""Batched log-likelihoods against one forward pass and one softmax a sequence."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import DeepseekV2ForCausalLM

from metier.evaluation import likelihood
from metier.evaluation.likelihood import (
    Continuations,
    ScoredSequence,
    continuation_losses,
    negative_log_likelihoods,
)

# Batches of another shape round differently in float32.
RELATIVE_TOLERANCE = 1e-5


@torch.inference_mode()
def slow_nats(model: DeepseekV2ForCausalLM, sequence: ScoredSequence) -> float:
    logits = model(torch.tensor([sequence.token_ids]), use_cache=False).logits[0].double()
    total = 0.0
    for position in range(sequence.start, len(sequence.token_ids)):
        total -= float(logits[position - 1].log_softmax(-1)[sequence.token_ids[position]])
    return total


@pytest.fixture
def sequences() -> list[ScoredSequence]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, start in ((2, 1), (63, 1), (64, 63), (17, 5), (1 + 63, 1), (3, 2)):
        token_ids = torch.randint(0, 300, (length,), generator=generator).tolist()
        made.append(ScoredSequence(token_ids=tuple(token_ids), start=start))
    return made


@pytest.mark.parametrize("tokens_in_batch", [1, 130, 10_000])
def test_each_sequence_scores_as_if_it_were_alone(
    model: DeepseekV2ForCausalLM,
    sequences: list[ScoredSequence],
    tokens_in_batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood, "TOKENS_IN_BATCH", tokens_in_batch)
    expected = [slow_nats(model, sequence) for sequence in sequences]
    with torch.inference_mode():
        assert negative_log_likelihoods(model, sequences) == pytest.approx(expected, rel=RELATIVE_TOLERANCE)


def test_the_logits_of_a_batch_are_bounded(
    model: DeepseekV2ForCausalLM, sequences: list[ScoredSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def note(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        sizes.append(output.numel())

    handle = model.lm_head.register_forward_hook(note)
    monkeypatch.setattr(likelihood, "LOGITS_IN_BATCH", 70 * model.config.vocab_size)
    with torch.inference_mode():
        negative_log_likelihoods(model, sequences)
    handle.remove()
    assert max(sizes) <= 70 * model.config.vocab_size
    assert len(sizes) > 3


def test_a_first_token_cannot_be_scored(model: DeepseekV2ForCausalLM) -> None:
    with pytest.raises(AssertionError, match="a scored token needs a token before it"):
        negative_log_likelihoods(model, [ScoredSequence(token_ids=(1, 2), start=0)])


@pytest.fixture
def items() -> list[Continuations]:
    generator = torch.Generator().manual_seed(2)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 300, (length,), generator=generator).tolist())

    shapes = [(1, (1, 2)), (40, (7, 1, 3, 9)), (63, (1, 1)), (12, (5,)), (64, (2, 30, 4)), (12, (8, 8, 8, 8))]
    return [
        Continuations(context_ids=ids(length), continuation_ids=tuple(ids(each) for each in lengths))
        for length, lengths in shapes
    ]


@pytest.mark.parametrize("tokens_in_batch", [1, 150, 10_000])
def test_a_shared_context_scores_each_continuation_as_if_the_text_were_run_whole(
    model: DeepseekV2ForCausalLM,
    items: list[Continuations],
    tokens_in_batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood, "TOKENS_IN_BATCH", tokens_in_batch)
    with torch.inference_mode():
        found = continuation_losses(model, items)
    for item, losses in zip(items, found, strict=True):
        whole = [
            ScoredSequence(token_ids=item.context_ids + ids, start=len(item.context_ids))
            for ids in item.continuation_ids
        ]
        expected = [slow_nats(model, sequence) for sequence in whole]
        assert losses == pytest.approx(expected, rel=RELATIVE_TOLERANCE)


def test_each_context_is_run_once(
    model: DeepseekV2ForCausalLM, items: list[Continuations], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: sizes.append(args[0].numel()))
    with torch.inference_mode():
        continuation_losses(model, [items[1]])
    handle.remove()
    assert sizes == [40, 4 * 8]


def test_a_batch_of_contexts_is_bounded(
    model: DeepseekV2ForCausalLM, items: list[Continuations], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: sizes.append(args[0].numel()))
    monkeypatch.setattr(likelihood, "LOGITS_IN_BATCH", 150 * model.config.vocab_size)
    with torch.inference_mode():
        continuation_losses(model, items)
    handle.remove()
    # Alone because of their own size: 64 tokens of context and 36 of continuations, padded to three of 30.
    assert max(sizes) <= 150
    assert len(sizes) >= 2 * 3


def test_virtual_tokens_of_a_prompt_are_no_part_of_what_is_scored(
    model: DeepseekV2ForCausalLM, sequences: list[ScoredSequence]
) -> None:
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompted = peft.get_peft_model(model, config).eval()
    vectors_PD = prompted.get_prompt(batch_size=1)[0].detach()
    embedded = model.get_input_embeddings()

    def slow(sequence: ScoredSequence) -> float:
        rows = torch.cat([vectors_PD, embedded(torch.tensor(sequence.token_ids))])
        log_p = model(inputs_embeds=rows[None], use_cache=False).logits[0, 3:].double().log_softmax(-1)
        places = range(sequence.start, len(sequence.token_ids))
        return -sum(float(log_p[place - 1, sequence.token_ids[place]]) for place in places)

    with torch.inference_mode():
        expected = [slow(sequence) for sequence in sequences]
        assert negative_log_likelihoods(prompted, sequences) == pytest.approx(expected, rel=RELATIVE_TOLERANCE)
        items = [Continuations(context_ids=(5, 6, 7), continuation_ids=((8,), (9, 10, 11)))]
        whole = [ScoredSequence(token_ids=(5, 6, 7, *ids), start=3) for ids in items[0].continuation_ids]
        assert continuation_losses(prompted, items)[0] == pytest.approx(
            [slow(one) for one in whole], rel=RELATIVE_TOLERANCE
        )
