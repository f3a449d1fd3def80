"""The loss falls on the assistant's tokens only, whatever way they are found; nothing is cut in silence."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from data.templates import MARKED_TEMPLATE, TEMPLATE, UNSTABLE_TEMPLATE
from metier.data.encode import IGNORED, Encoded, encode, encode_records
from metier.data.formats import parse_record
from metier.data.records import Record
from metier.errors import DataError


def chat(*contents: str, origin: str = "a.jsonl:1", **row: Any) -> Record:
    """Messages by turns, the user first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return parse_record({"messages": messages, **row}, origin)


def trained(item: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The runs of trained tokens as text."""
    runs: list[list[int]] = [[]]
    for label in item.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "ends"), [(TEMPLATE, "<|end|>\n"), (MARKED_TEMPLATE, "<|end|>")], ids=["by prefix", "marked"]
)
def test_only_the_assistants_turns_are_trained_on(tokenizer: PreTrainedTokenizerFast, template: str, ends: str) -> None:
    tokenizer.chat_template = template
    item = encode(chat("What is it?", "It is blue.", "Name  a number", " четыре 4\n", "Thanks"), tokenizer)
    assert trained(item, tokenizer) == [f"It is blue.{ends}", f" четыре 4\n{ends}"]
    assert tokenizer.decode(item.input_ids) == (
        "<|user|>\nWhat is it?<|end|>\n<|assistant|>\nIt is blue.<|end|>\n<|user|>\nName  a number<|end|>\n"
        "<|assistant|>\n четыре 4\n<|end|>\n<|user|>\nThanks<|end|>\n"
    )
    assert all(label in (token, IGNORED) for token, label in zip(item.input_ids, item.labels, strict=True))


def test_a_reply_that_the_tokenizer_joins_with_the_prompt_is_trained_on_whole(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    item = encode(chat("What?", ":: blue"), tokenizer)
    assert tokenizer.tokenize("assistant:::")[-1] == ":::"
    assert trained(item, tokenizer) == ["::: blue"]


def test_a_reply_in_the_first_message_is_found_by_marks_only(tokenizer: PreTrainedTokenizerFast) -> None:
    record = parse_record({"messages": [{"role": "assistant", "content": "Hi"}]}, "a.jsonl:1")
    with pytest.raises(DataError, match=r"a\.jsonl:1: the record begins with the assistant, .* Put a user message"):
        encode(record, tokenizer)
    tokenizer.chat_template = MARKED_TEMPLATE
    assert trained(encode(record, tokenizer), tokenizer) == ["Hi<|end|>"]


def test_a_template_that_is_not_prefix_stable_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = UNSTABLE_TEMPLATE
    assert trained(encode(chat("What?", "Blue."), tokenizer), tokenizer) == ["Blue.<|end|>\n"]
    message = (
        r"a\.jsonl:1: messages\[1\]: the chat template is not prefix-stable\. Up to this message it writes "
        r"'.*<\|assistant\|>\\nBlue\.<\|end\|>\\n', but in the whole conversation there stands "
        r"'.*<\|assistant\|>\\n<\|end\|>.*"
    )
    with pytest.raises(DataError, match=message):
        encode(chat("What?", "Blue.", "And?", "Red."), tokenizer)


def test_a_tokenizer_without_a_template_refuses_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: the tokenizer '.*' has no chat template, .* chat_template\.jinja"
    ):
        encode(chat("What?", "Blue."), tokenizer)


def test_a_template_that_refuses_a_record_names_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('Only one user message') }}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template refuses the record: Only one user message"):
        encode(chat("What?", "Blue."), tokenizer)


def test_a_tokenizer_without_offsets_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Slow:
        is_fast = False
        chat_template = TEMPLATE
        name_or_path = "slow"
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012

        def get_chat_template(self, name: None, tools: None) -> str:
            return TEMPLATE

    with pytest.raises(DataError, match=r"'slow' does not tell which characters .* Use its fast version"):
        encode(chat("What?", "Blue."), Slow())


def test_prompt_and_completion_are_joined_plainly_without_a_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    record = parse_record({"prompt": "Name a num", "completion": "ber"}, "a:1")
    with_template = encode(record, tokenizer)
    assert trained(with_template, tokenizer) == ["ber<|end|>\n"]
    assert tokenizer.decode(with_template.input_ids).startswith("<|user|>\nName a num<|end|>\n<|assistant|>")
    tokenizer.chat_template = None
    plain = encode(record, tokenizer)
    assert plain.input_ids == [
        *tokenizer("Name a num")["input_ids"],
        *tokenizer("ber")["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert trained(plain, tokenizer) == ["ber<|end|>"]


def test_all_of_a_plain_text_is_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    item = encode(parse_record({"text": "It is blue."}, "a:1"), tokenizer)
    assert item.labels == item.input_ids == [*tokenizer("It is blue.")["input_ids"], tokenizer.eos_token_id]
    assert item.num_trained_tokens == len(item.labels) - 1


def test_a_tokenizer_that_adds_an_end_gets_no_second_one(tokenizer: PreTrainedTokenizerFast) -> None:
    once = encode(parse_record({"text": "It is blue.<|end|>"}, "a:1"), tokenizer)
    assert once.input_ids.count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_without_an_end_refuses_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"a:1: the tokenizer '.*' has no end-of-text token.* Set tokenizer\.eos_token"):
        encode(parse_record({"text": "It is blue."}, "a:1"), tokenizer)


def test_too_long_records_are_left_out_whole_and_reported(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    records = [chat("What?", "blue " * (20 if i % 2 else 1), origin=f"a.jsonl:{i}") for i in range(1, 16)]
    length = len(encode(records[1], tokenizer).input_ids)
    with caplog.at_level(logging.WARNING):
        result = encode_records(records, tokenizer, max_length=length)
    assert len(result.items) == 7
    assert result.items[0].origin == "a.jsonl:2"
    assert result.too_long == tuple(f"a.jsonl:{i}" for i in range(1, 16, 2))
    longest = len(encode(records[0], tokenizer).input_ids)
    assert caplog.messages == [
        f"8 of 15 records are longer than max_length={length} and left out (the longest has {longest} "
        "tokens): a.jsonl:1, a.jsonl:3, a.jsonl:5, a.jsonl:7, a.jsonl:9 and 3 more."
    ]
    assert all(len(item.input_ids) == len(item.labels) <= length for item in result.items)


def test_nothing_is_reported_where_all_is_trained_on(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    result = encode_records([chat("What?", "Blue.")], tokenizer, max_length=1000)
    assert (result.report(), caplog.messages) == (None, [])
    assert result.num_tokens == len(result.items[0].input_ids) > result.num_trained_tokens > 0


def test_records_without_a_label_are_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    result = encode_records([chat("What?"), chat("What?", "Blue.")], tokenizer, max_length=1000)
    assert result.without_label == ("a.jsonl:1",)
    assert (result.report() or "").startswith("1 records have no token to train on")


def test_records_that_are_all_too_long_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"all 1 records are longer than max_length=3; the shortest has \d\d tokens"):
        encode_records([chat("What?", "Blue.")], tokenizer, max_length=3)


def test_no_records_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no records to encode"):
        encode_records([], tokenizer, max_length=3)


def test_a_template_that_ignores_tools_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    record = chat("What?", "Blue.", tools=[{"name": "paint"}])
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: the record has tools, but the chat template of '.*' ignores them"
    ):
        encode_records([chat("What?", "Blue."), record], tokenizer, max_length=1000)
    tokenizer.chat_template = MARKED_TEMPLATE
    item = encode_records([record], tokenizer, max_length=1000).items[0]
    assert tokenizer.decode(item.input_ids).startswith('[{"name": "paint"}]\n<|user|>')
    assert trained(item, tokenizer) == ["Blue.<|end|>"]
