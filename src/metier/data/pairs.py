"""Records for an encoder-decoder: what the encoder reads, and what the decoder is trained to say.

Such models have no chat template. What was said before a reply is joined by line breaks, without names of roles, and
goes into the encoder; the reply and the end-of-text token are the decoder's. A record with several replies gives a
pair for each, so that none is left out.
"""

# B records in a batch, S tokens of the longest prompt, T tokens of the longest reply

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from metier.data.collate import padded
from metier.data.encode import IGNORED, EncodedSet, encoded_set, with_end, without_end
from metier.data.message import Message, Record
from metier.errors import DataError


@dataclass(frozen=True, slots=True)
class Pair:
    """One reply with what goes before it."""

    input_ids: list[int]
    """What the encoder reads."""
    labels: list[int]
    """What the decoder says, all of it trained on. The decoder's inputs are these, moved by one place."""
    origin: str

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids) + len(self.labels)

    @property
    def num_trained_tokens(self) -> int:
        return len(self.labels)

    @property
    def length(self) -> int:
        """Of the longer side, which is what `max_length` limits."""
        return max(len(self.input_ids), len(self.labels))

    def parts(self) -> list[tuple[bool, list[int]]]:
        """Runs of tokens and whether they are trained on."""
        return [(False, self.input_ids), (True, self.labels)]


def encode_pairs(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> EncodedSet[Pair]:
    """As `encode_records`, for an encoder-decoder; `max_length` holds for prompt and reply each.

    Raises:
        DataError: no records, none that fits, or one that is no prompt with a reply.
    """
    pairs = [pair for record in records for pair in pairs_of(record, tokenizer)]
    return encoded_set(pairs, max_length=max_length)


def pairs_of(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """A pair for each reply of one record, whatever its length.

    Raises:
        DataError: a plain text, tools, or a record without a reply that something goes before.
    """
    if record.tools:
        raise DataError(
            f"{record.origin}: the record has tools, which an encoder-decoder without a chat template cannot be told "
            f"of. Remove them from the records."
        )
    replies = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
    if not replies or replies[0] == 0:
        got = ", ".join(message.role for message in record.messages) or "plain text"
        raise DataError(
            f"{record.origin}: got {got}; an encoder-decoder needs a prompt and then the assistant's reply. Give "
            f"records with prompt and completion, or conversations that the assistant does not begin."
        )
    return [
        Pair(
            input_ids=encoder_ids(record.messages[:index], tokenizer),
            labels=_reply_ids(record, index, tokenizer),
            origin=record.origin,
        )
        for index in replies
    ]


def encoder_text(messages: Sequence[Message]) -> str:
    """What goes before a reply as one text."""
    return "\n".join(message.content for message in messages)


def encoder_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What goes before a reply as the encoder reads it, with the end that the tokenizer puts."""
    ids: list[int] = tokenizer(encoder_text(messages))["input_ids"]
    return ids


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Pads a batch's prompts and replies to the longest of each, on the right.

    Works as the `data_collator` of transformers' trainers, on `Pair` or dicts with its fields.
    """

    pad_token_id: int
    start_token_id: int
    """What the decoder reads first: `decoder_start_token_id`."""

    def __call__(self, features: Sequence[Pair | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack.

        Args:
            features: at least one pair.

        Returns:
            input_ids and attention_mask, (num_pairs, longest prompt); decoder_input_ids, decoder_attention_mask and
            labels, (num_pairs, longest reply); all int64.
        """
        pairs = [item if isinstance(item, Pair) else _pair(item) for item in features]
        longest, longest_reply = (
            max(map(len, side)) for side in zip(*((p.input_ids, p.labels) for p in pairs), strict=True)
        )
        read = [[self.start_token_id, *pair.labels[:-1]] for pair in pairs]
        return {
            "input_ids": padded([pair.input_ids for pair in pairs], longest, self.pad_token_id),
            "attention_mask": padded([[1] * len(pair.input_ids) for pair in pairs], longest, 0),
            "decoder_input_ids": padded(read, longest_reply, self.pad_token_id),
            "decoder_attention_mask": padded([[1] * len(pair.labels) for pair in pairs], longest_reply, 0),
            "labels": padded([pair.labels for pair in pairs], longest_reply, IGNORED),
        }


def token_mean_loss(outputs: Any, labels_BT: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross entropy, the mean over the step's labelled tokens, as transformers' trainers take a `compute_loss_func`.

    Args:
        outputs: with `logits`, (B, T, vocabulary).
        labels_BT: not moved: position t of the logits predicts label t.
        num_items_in_batch: labelled tokens of the whole step; None for those of `labels_BT`.
    """
    return mean_cross_entropy(outputs.logits, labels_BT, num_items_in_batch)


def mean_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """`token_mean_loss` of logits, (B, T, vocabulary)."""
    logits_NV = logits_BTV.flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(logits_NV, labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / ((labels_BT != IGNORED).sum() if num_items is None else num_items)


def _reply_ids(record: Record, index: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text_target=record.messages[index].content)["input_ids"]
    return with_end(without_end(ids, tokenizer), record, tokenizer)


def _pair(feature: Mapping[str, Any]) -> Pair:
    return Pair(list(feature["input_ids"]), list(feature["labels"]), str(feature.get("origin", "")))
