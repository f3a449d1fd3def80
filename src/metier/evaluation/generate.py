"""Replies of a model to chat prompts: greedy, batched, with the model's own key-value cache.

Prompts are sorted by length so that a batch holds little padding, and padded on the left so that every reply
starts in the same column. Padding is masked out of attention and positions count from the first real token,
so a prompt's reply is the one it would get alone, up to the rounding of other matrix shapes. An encoder's prompts
are padded on the right: Switch Transformers count padding towards what an expert can take, so it must come last.
"""

# N prompts, B prompts in a batch, T tokens

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftType
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from metier.data.pairs import encoder_ids, encoder_text
from metier.data.records import Record
from metier.errors import DataError
from metier.evaluation.likelihood import has_prompt
from metier.models.encoder_decoder import is_encoder_decoder

MAX_PROMPT_TOKENS_IN_BATCH = 32_768
"""Bounds a batch's memory where prompts are long: padded prompt tokens, whatever `batch_size` says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One test item ready to be answered."""

    text: str
    token_ids: tuple[int, ...]
    reference: str
    origin: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the record, for metrics that need more than the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the model answered."""

    text: str
    is_cut: bool
    """It reached max_new_tokens before the model ended it."""


def encode_prompts(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    max_length: int | None,
    for_encoder: bool = False,
) -> list[Prompt]:
    """Turn records into prompts: all messages but the last through the chat template, the last as the
    reference.

    Args:
        records: each must end with an assistant's message.
        tokenizer: has a chat template, or the records are plain prompts and completions.
        max_new_tokens: room that a reply needs after the prompt.
        max_length: the model's context in tokens; None where it has no limit.
        for_encoder: prompts of an encoder-decoder, which have no chat template.

    Raises:
        DataError: no chat template, a record that does not end with the assistant, or a prompt that does not
            fit.
    """
    prompts = []
    for record in records:
        if len(record.messages) < 2 or record.messages[-1].role != "assistant":
            roles = ", ".join(message.role for message in record.messages) or "plain text"
            raise DataError(
                f"{record.origin}: got {roles}; a test record needs a prompt and then the assistant's reply, "
                "which is the reference."
            )
        if for_encoder:
            context = record.messages[:-1]
            text, token_ids = encoder_text(context), tuple(encoder_ids(context, tokenizer))
        else:
            text, token_ids = _encode_context(record, tokenizer)
        if max_length is not None and len(token_ids) + max_new_tokens > max_length:
            raise DataError(
                f"{record.origin}: a prompt of {len(token_ids)} tokens and a reply of up to {max_new_tokens} "
                f"do not fit the model's context of {max_length}. Remove the record or lower max_new_tokens."
            )
        reference = record.messages[-1].content
        prompts.append(
            Prompt(text=text, token_ids=token_ids, reference=reference, origin=record.origin, extra=record.extra)
        )
    return prompts


def _encode_context(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[int, ...]]:
    """Text and tokens before the reply, as training encodes them (`metier.data.encode`)."""
    context = record.messages[:-1]
    if tokenizer.chat_template is None and record.is_plain:
        token_ids = tokenizer(context[0].content)["input_ids"]
        ends = bool(token_ids) and token_ids[-1] == tokenizer.eos_token_id
        return context[0].content, tuple(token_ids[:-1] if ends else token_ids)
    if tokenizer.chat_template is None:
        raise DataError(
            f"{record.origin}: the tokenizer {tokenizer.name_or_path!r} has no chat template to write "
            "prompts with. Set tokenizer.chat_template, or evaluate the chat version of the model."
        )
    text = tokenizer.apply_chat_template(
        [message.to_dict() for message in context],
        tools=list(record.tools) if record.tools else None,
        add_generation_prompt=True,
        tokenize=False,
    )
    return str(text), tuple(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """Answer every prompt greedily; replies come back in the order of the prompts.

    The model's own generation settings (temperature, repetition penalty, …) are overridden: they would make
    scores depend on a file that is no part of the comparison. Call it in eval mode and without gradients.

    Args:
        model: a language model with `generate`, PEFT-wrapped or not.
        tokenizer: the model's.
        prompts: from `encode_prompts`.
        max_new_tokens: a reply's limit in tokens.
        batch_size: most prompts in a batch.
        on_progress: called with (prompts done, prompts in all) after each batch.
    """
    stop_ids = _stop_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop_ids, default=0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad_id,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )
    replies: dict[int, Reply] = {}
    has_encoder = is_encoder_decoder(model)
    # PEFT drops the positions of what stands behind its own tokens, so that padding would move them
    batches = _batches_by_length(prompts, batch_size=batch_size, of_one_length=_drops_positions(model))
    for batch in batches:
        sequences = [prompts[index].token_ids for index in batch]
        input_ids_BT, attention_mask_BT = _pad(sequences, pad_id=pad_id, on_left=not has_encoder)
        output_ids = model.generate(
            input_ids=input_ids_BT.to(model.device),
            attention_mask=attention_mask_BT.to(model.device),
            generation_config=config,
        )
        # the decoder of an encoder-decoder begins with one token of its own
        num_given = 1 if has_encoder else input_ids_BT.shape[1]
        for index, new_ids in zip(batch, output_ids[:, num_given:].tolist(), strict=True):
            replies[index] = _read_reply(new_ids, stop_ids, tokenizer)
        if on_progress is not None:
            on_progress(len(replies), len(prompts))
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None  # of the last batch; a call with embeddings alone would take them for its own
    return [replies[index] for index in range(len(prompts))]


def _drops_positions(model: PreTrainedModel) -> bool:
    """Whether an adapter of PEFT puts tokens before a prompt, and has what follows counted from there, padding too."""
    active: Any = getattr(model, "active_peft_config", None)
    return has_prompt(model) and active.peft_type not in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    stop_ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return {int(token_id) for token_id in {*stop_ids, tokenizer.eos_token_id} if token_id is not None}


def _batches_by_length(prompts: Sequence[Prompt], *, batch_size: int, of_one_length: bool = False) -> list[list[int]]:
    """Indices of prompts, the longest first, so that the batch that needs most memory is the first to run."""
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].token_ids), index)):
        if batches and len(batches[-1]) < batch_size:
            longest = len(prompts[batches[-1][0]].token_ids)
            is_alike = not of_one_length or len(prompts[index].token_ids) == longest
            if is_alike and (len(batches[-1]) + 1) * longest <= MAX_PROMPT_TOKENS_IN_BATCH:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


def _pad(sequences: Sequence[Sequence[int]], *, pad_id: int, on_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(sequence) for sequence in sequences)
    input_ids_BT = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros((len(sequences), width), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if on_left else 0
        input_ids_BT[row, start : start + len(sequence)] = torch.tensor(sequence)
        attention_mask_BT[row, start : start + len(sequence)] = 1
    return input_ids_BT, attention_mask_BT


def _read_reply(new_ids: list[int], stop_ids: set[int], tokenizer: PreTrainedTokenizerBase) -> Reply:
    end = next((position for position, token_id in enumerate(new_ids) if token_id in stop_ids), None)
    text = tokenizer.decode(new_ids if end is None else new_ids[:end], skip_special_tokens=True)
    assert isinstance(text, str)
    return Reply(text=text.strip(), is_cut=end is None)
