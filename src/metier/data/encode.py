"""Records to token ids and labels, with the loss on the assistant's tokens only.

A record longer than `max_length` is left out whole: a cut conversation teaches the model to stop in
mid-sentence, or trains on a prompt without its reply. How many were left out, and which, is always reported.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from metier.data.message import Record
from metier.data.render import Rendered, check_tools_are_rendered, render
from metier.errors import DataError

IGNORED = -100
"""The label of a token that is not trained on, as torch's cross entropy and transformers have it."""
_SHOWN_ORIGINS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One record as the model sees it. Labels are not shifted: transformers' models shift them."""

    input_ids: list[int]
    labels: list[int]
    """The token's own id where it is trained on, else IGNORED; as long as input_ids."""
    origin: str

    @property
    def num_trained_tokens(self) -> int:
        """Tokens with a loss. The first token has none, whatever its label: nothing comes before it."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """What `max_length` limits."""
        return len(self.input_ids)

    def parts(self) -> list[tuple[bool, list[int]]]:
        """Runs of tokens and whether they are trained on."""
        marked = zip(self.input_ids, self.labels, strict=True)
        runs = groupby(marked, key=lambda pair: pair[1] != IGNORED)
        return [(is_trained, [token for token, _ in run]) for is_trained, run in runs]


class Item(Protocol):
    """What an encoded record is to those who count it: `Encoded`, or `metier.data.pairs.Pair`."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...
    @property
    def origin(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_trained_tokens(self) -> int: ...
    @property
    def length(self) -> int: ...
    def parts(self) -> list[tuple[bool, list[int]]]: ...


ItemT = TypeVar("ItemT", bound=Item, covariant=True)


@dataclass(frozen=True, slots=True)
class EncodedSet(Generic[ItemT]):
    """The records that are trained on, and the origins of those that are not."""

    items: tuple[ItemT, ...]
    too_long: tuple[str, ...]
    """Origins of the records longer than max_length; they are not among the items."""
    without_label: tuple[str, ...]
    """Origins of the items without a single token to train on, e.g. conversations without an assistant."""
    max_length: int
    longest_tokens: int
    """Length of the longest record, left out or not."""

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_trained_tokens(self) -> int:
        return sum(item.num_trained_tokens for item in self.items)

    def report(self) -> str | None:
        """What is not trained on, in words; None where everything is."""
        lines = []
        if self.too_long:
            total = len(self.items) + len(self.too_long)
            lines.append(
                f"{len(self.too_long):,} of {total:,} records are longer than max_length={self.max_length} "
                f"and left out (the longest has {self.longest_tokens:,} tokens): {_shown(self.too_long)}."
            )
        if self.without_label:
            lines.append(
                f"{len(self.without_label):,} records have no token to train on, as the assistant says "
                f"nothing: {_shown(self.without_label)}."
            )
        return "\n".join(lines) or None


def encode_records(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> EncodedSet[Encoded]:
    """Encode records for training. What is left out is logged as a warning, and kept in the result.

    Args:
        records: at least one.
        tokenizer: with a chat template, unless all records are texts or prompts with completions.
        max_length: most tokens of a record; longer ones are left out, never cut.

    Raises:
        DataError: no records, none that fits, or one that cannot be rendered.
    """
    if with_tools := next((record for record in records if record.tools), None):
        check_tools_are_rendered(with_tools, tokenizer)
    return encoded_set([encode(record, tokenizer) for record in records], max_length=max_length)


def encoded_set(encoded: Sequence[ItemT], *, max_length: int) -> EncodedSet[ItemT]:
    """What is trained on of encoded records; what is left out is logged as a warning.

    Raises:
        DataError: there is none, or none is short enough.
    """
    if not encoded:
        raise DataError("no records to encode. Expected at least one; check the data set.")
    items = tuple(item for item in encoded if item.length <= max_length)
    result = EncodedSet(
        items=items,
        too_long=tuple(item.origin for item in encoded if item.length > max_length),
        without_label=tuple(item.origin for item in items if item.num_trained_tokens == 0),
        max_length=max_length,
        longest_tokens=max(item.length for item in encoded),
    )
    if not items:
        raise DataError(
            f"all {len(encoded):,} records are longer than max_length={max_length}; the shortest has "
            f"{min(item.length for item in encoded):,} tokens. Raise max_length or shorten the "
            f"records."
        )
    if report := result.report():
        logger.warning(report)
    return result


def encode(record: Record, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode one record, whatever its length."""
    if record.text is not None:
        input_ids = with_end(_with_start(record.text, tokenizer), record, tokenizer)
        return Encoded(input_ids, list(input_ids), record.origin)
    if record.is_plain and tokenizer.chat_template is None:
        return _encode_plain(record, tokenizer)
    return _encode_chat(render(record, tokenizer), record, tokenizer)


def _encode_chat(rendered: Rendered, record: Record, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    if not tokenizer.is_fast:
        raise DataError(
            f"{record.origin}: the tokenizer '{tokenizer.name_or_path}' does not tell which characters a "
            f"token covers, so the assistant's tokens cannot be found. Use its fast version (tokenizer.json)."
        )
    # the whole text at once: pieces would be tokenized differently at their edges than in a conversation
    output = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids: list[int] = output["input_ids"]
    spans = iter([*rendered.trained_spans, (len(rendered.text) + 1, len(rendered.text) + 1)])
    start, end = next(spans)
    labels = []
    for token, (first, last) in zip(input_ids, output["offset_mapping"], strict=True):
        while first >= end and end <= len(rendered.text):
            start, end = next(spans)
        labels.append(token if last > start and first < end else IGNORED)
    return Encoded(input_ids, labels, record.origin)


def _encode_plain(record: Record, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Prompt, completion and end, tokenized apart: at inference the prompt comes alone too."""
    prompt, completion = (message.content for message in record.messages)
    prompt_ids = _with_start(prompt, tokenizer)
    completion_ids = with_end(tokenizer(completion, add_special_tokens=False)["input_ids"], record, tokenizer)
    labels = [IGNORED] * len(prompt_ids) + completion_ids
    return Encoded(prompt_ids + completion_ids, labels, record.origin)


def _with_start(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text's tokens after the tokenizer's start, without what it puts at the end."""
    return without_end(tokenizer(text)["input_ids"], tokenizer)


def without_end(input_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens without an end-of-text token behind them."""
    return input_ids[:-1] if input_ids and input_ids[-1] == tokenizer.eos_token_id else input_ids


def with_end(input_ids: list[int], record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens and an end-of-text token.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{record.origin}: the tokenizer '{tokenizer.name_or_path}' has no end-of-text token, so the "
            f"model could not learn where a completion ends. Set tokenizer.eos_token."
        )
    return [*input_ids, int(tokenizer.eos_token_id)]


def _shown(origins: Sequence[str]) -> str:
    rest = len(origins) - _SHOWN_ORIGINS
    return ", ".join(origins[:_SHOWN_ORIGINS]) + (f" and {rest:,} more" if rest > 0 else "")
