"""Records for an encoder-decoder: a pair for each reply, padded side by side, nothing cut and nothing left out in silence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from metier.data.formats import parse_record
from metier.data.message import Message, Record
from metier.data.pairs import Pair, PairCollator, encode_pairs, pairs_of, token_mean_loss
from metier.errors import DataError
from tiny_models import tiny_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def chat(*turns: tuple[str, str]) -> Record:
    return Record(messages=tuple(Message(role=role, content=text) for role, text in turns), origin="a.jsonl:1")


def ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    found: list[int] = tokenizer(text)["input_ids"]
    return found


def test_the_encoder_reads_the_prompt_and_the_decoder_says_the_reply_and_its_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    (pair,) = pairs_of(parse_record({"prompt": "Who?", "completion": "He."}, "a:1"), tokenizer)
    assert pair.input_ids == ids("Who?", tokenizer)
    assert pair.labels == [*ids("He.", tokenizer), tokenizer.eos_token_id]
    assert (pair.num_tokens, pair.num_trained_tokens, pair.length) == (4 + 4, 4, 4)


def test_an_end_that_the_tokenizer_puts_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = pairs_of(chat(("user", "Who?"), ("assistant", "He.<eos>")), tokenizer)
    assert pair.labels.count(tokenizer.eos_token_id) == 1


def test_every_reply_of_a_conversation_is_a_pair_with_all_that_went_before(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (("system", "Be short."), ("user", "Who?"), ("assistant", "He."), ("user", "Why?"), ("assistant", "So."))
    first, second = pairs_of(chat(*turns), tokenizer)
    assert tokenizer.decode(first.input_ids) == "Be short.\nWho?"
    assert tokenizer.decode(second.input_ids) == "Be short.\nWho?\nHe.\nWhy?"
    assert [tokenizer.decode(pair.labels) for pair in (first, second)] == ["He.<eos>", "So.<eos>"]


@pytest.mark.parametrize(
    ("record", "got"),
    [
        (parse_record({"text": "It is blue."}, "a.jsonl:1"), "plain text"),
        (chat(("user", "Who?")), "user"),
        (chat(("assistant", "He."), ("user", "Why?")), "assistant, user"),
    ],
)
def test_what_is_no_prompt_with_a_reply_is_refused(
    record: Record, got: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=f"a.jsonl:1: got {got}; an encoder-decoder needs a prompt"):
        pairs_of(record, tokenizer)


def test_tools_and_a_tokenizer_without_an_end_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = chat(("user", "Who?"), ("assistant", "He."))
    with pytest.raises(DataError, match=r"a\.jsonl:1: the record has tools"):
        pairs_of(Record(messages=plain.messages, tools=({"name": "f"},), origin=plain.origin), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        pairs_of(plain, tokenizer)


def test_pairs_too_long_on_either_side_are_left_out_and_reported(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [("a" * 10, "b" * 9), ("a" * 11, "b"), ("a", "b" * 10)]  # the reply's end is a token too
    records = [parse_record({"prompt": p, "completion": c}, f"a:{i}") for i, (p, c) in enumerate(texts, 1)]
    encoded = encode_pairs(records, tokenizer, max_length=10)
    assert [pair.origin for pair in encoded.items] == ["a:1"]
    assert encoded.too_long == ("a:2", "a:3")
    assert encoded.longest_tokens == 11
    assert (encoded.num_tokens, encoded.num_trained_tokens) == (20, 10)
    assert "2 of 3 records are longer than max_length=10" in caplog.text
    with pytest.raises(DataError, match=r"all 3 records are longer than max_length=5"):
        encode_pairs(records, tokenizer, max_length=5)
    with pytest.raises(DataError, match="no records to encode"):
        encode_pairs([], tokenizer, max_length=5)


def test_a_batch_is_padded_on_the_right_and_the_decoder_reads_one_place_behind() -> None:
    pairs = [Pair([5, 6, 7], [8, 2], "a:1"), {"input_ids": [9], "labels": [10, 11, 2], "origin": "a:2"}]
    batch = PairCollator(pad_token_id=0, start_token_id=4)(pairs)  # type: ignore[arg-type]
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [9, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "decoder_input_ids": [[4, 8, 0], [4, 10, 11]],
        "decoder_attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[8, 2, -100], [10, 11, 2]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_the_loss_is_the_mean_over_the_steps_labels() -> None:
    logits_BTV = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels_BT = torch.tensor([[1, 2, -100], [3, -100, -100]])
    logs: list[Tensor] = [-logits_BTV.log_softmax(-1)[b, t, labels_BT[b, t]] for b, t in ((0, 0), (0, 1), (1, 0))]
    outputs = SimpleNamespace(logits=logits_BTV)
    torch.testing.assert_close(token_mean_loss(outputs, labels_BT), sum(logs) / 3)
    torch.testing.assert_close(token_mean_loss(outputs, labels_BT, num_items_in_batch=12), sum(logs) / 12)
