"""Packing fills whole sequences with whole records in a random order, and cuts only at their ends."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.templates import UNSTABLE_TEMPLATE
from metier.data.formats import parse_record
from metier.data.pack import pack
from metier.data.records import Record
from metier.errors import DataError


def chats(count: int) -> list[Record]:
    return [parse_record({"prompt": f"Name {i}.", "completion": f"It is {i}."}, f"a:{i}") for i in range(count)]


def test_sequences_are_full_and_hold_whole_records_end_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack(chats(50), tokenizer, sequence_length=63, num_tokens=300, seed=0)
    assert packed.shape == (4, 63)
    assert packed.dtype == torch.int64
    text = tokenizer.decode(packed.flatten().tolist())
    whole = text.split("<|user|>\n")[1:-1]
    expected = {f"Name {i}.<|end|>\n<|assistant|>\nIt is {i}.<|end|>\n" for i in range(50)}
    assert len(whole) > 5
    assert len(set(whole)) == len(whole)
    assert set(whole) <= expected


def test_order_is_random_and_repeats_with_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    def packed(seed: int) -> torch.Tensor:
        return pack(chats(50), tokenizer, sequence_length=64, num_tokens=256, seed=seed)

    assert torch.equal(packed(0), packed(0))
    assert not torch.equal(packed(0), packed(1))


def test_all_records_are_used_where_they_are_few(tokenizer: PreTrainedTokenizerFast) -> None:
    num_tokens = pack(chats(3), tokenizer, sequence_length=10_000, num_tokens=10_000, seed=0).numel()
    assert pack(chats(3), tokenizer, sequence_length=7, num_tokens=10_000, seed=0).shape == (
        num_tokens // 7,
        7,
    )


def test_less_than_a_sequence_gives_one_shorter_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack(chats(1), tokenizer, sequence_length=1000, num_tokens=1000, seed=0)
    text = "<|user|>\nName 0.<|end|>\n<|assistant|>\nIt is 0.<|end|>\n"
    assert packed.tolist() == [tokenizer(text)["input_ids"]]
    assert pack(chats(9), tokenizer, sequence_length=1000, num_tokens=20, seed=0).shape == (1, 20)


def test_a_template_that_is_not_prefix_stable_can_be_packed(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = UNSTABLE_TEMPLATE
    turns = [{"role": role, "content": "Blue."} for role in ("user", "assistant") * 2]
    record = parse_record({"messages": turns}, "a:1")
    assert pack([record], tokenizer, sequence_length=8, num_tokens=8, seed=0).shape == (1, 8)


def test_texts_and_plain_prompts_can_be_packed_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    records = [*chats(1), parse_record({"text": "It is blue."}, "a:2")]
    packed = pack(records, tokenizer, sequence_length=1000, num_tokens=1000, seed=0)
    assert packed[0].tolist().count(tokenizer.eos_token_id) == 2


def test_nothing_to_pack_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no records to pack"):
        pack([], tokenizer, sequence_length=8, num_tokens=8, seed=0)
    with pytest.raises(DataError, match="must be at least 1, got 0 and 8"):
        pack(chats(1), tokenizer, sequence_length=0, num_tokens=8, seed=0)


def test_records_that_render_to_nothing_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for message in messages %}{% endfor %}"
    with pytest.raises(DataError, match="all 3 records render to no token at all"):
        pack(chats(3), tokenizer, sequence_length=8, num_tokens=16, seed=0)
