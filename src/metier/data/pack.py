"""Records to full sequences without padding, for measuring a model on them rather than training it."""

# S sequences, T tokens a sequence

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from metier.data.encode import encode
from metier.data.message import Record
from metier.data.render import render_text
from metier.errors import DataError


def pack(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    num_tokens: int,
    seed: int,
) -> Tensor:
    """Shuffle whole records, lay them end to end and cut the row into full sequences.

    Args:
        records: at least one; each is used at most once.
        tokenizer: the model's.
        sequence_length: tokens of a sequence.
        num_tokens: tokens wanted in all. Fewer come back where the records end before.
        seed: of the order.

    Returns:
        int64, (num_sequences, sequence_length). Where the tokens do not fill one sequence, one shorter one.

    Paper: ESFT, arXiv:2407.01906, section 3 (concatenated samples of the sequence length).
    """
    if sequence_length < 1 or num_tokens < 1:
        raise DataError(f"sequence_length and num_tokens must be at least 1, got {sequence_length} and {num_tokens}.")
    if not records:
        raise DataError("no records to pack. Expected at least one; check the data set.")
    token_ids: list[int] = []
    for record in random.Random(seed).sample(records, len(records)):
        token_ids += _token_ids(record, tokenizer)
        if len(token_ids) >= num_tokens:
            break
    if not token_ids:
        raise DataError(
            f"all {len(records):,} records render to no token at all, so there is nothing to measure on. "
            "Look at the records, and at the tokenizer's chat template."
        )
    num_available = min(len(token_ids), num_tokens)
    length = min(sequence_length, num_available)
    num_sequences = num_available // length
    return torch.tensor(token_ids[: num_sequences * length], dtype=torch.int64).view(num_sequences, length)


def _token_ids(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if record.text is not None or (record.is_plain and tokenizer.chat_template is None):
        return encode(record, tokenizer).input_ids
    # without the spans of replies, which not every template allows to tell
    token_ids: list[int] = tokenizer(render_text(record, tokenizer), add_special_tokens=False)["input_ids"]
    return token_ids
