"""Prompts from conversations, texts and token ids, or a refusal that says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from metier.errors import RequestError
from metier.serving.prompts import PromptEncoder
from serving.made_tokenizers import byte_level, sentencepiece_like


def with_template(template: str | None) -> Any:
    tokenizer = copy.copy(byte_level())
    tokenizer.chat_template = template
    return tokenizer


def test_a_conversation_is_encoded_up_to_the_reply() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = byte_level().decode(PromptEncoder(byte_level()).encode_chat(messages))
    assert text == "<|endoftext|><|system|>\nBe brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    encoder = PromptEncoder(byte_level())
    as_developer, as_system = (
        encoder.encode_chat([{"role": role, "content": "Be brief."}]) for role in ("developer", "system")
    )
    assert as_developer == as_system


def test_a_developer_stays_one_where_the_template_knows_it() -> None:
    tokenizer = with_template("{% for m in messages %}{{ m['role'] }}{% endfor %}{# developer #}")
    token_ids = PromptEncoder(tokenizer).encode_chat([{"role": "developer", "content": ""}])
    assert tokenizer.decode(token_ids) == "developer"


def test_without_a_chat_template_a_conversation_is_refused() -> None:
    with pytest.raises(RequestError, match=r"has no chat template.*\nAsk /v1/completions"):
        PromptEncoder(with_template(None)).encode_chat([{"role": "user", "content": "Why?"}])


def test_a_conversation_that_the_template_refuses_says_why() -> None:
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="the model's chat template refuses the conversation: roles must alternate"):
        PromptEncoder(tokenizer).encode_chat([{"role": "user", "content": "Why?"}])


def test_a_text_is_encoded_as_the_tokenizer_does() -> None:
    assert PromptEncoder(byte_level()).encode_text("one two") == byte_level()("one two")["input_ids"]


def test_an_empty_text_begins_with_the_tokenizers_first_token() -> None:
    assert PromptEncoder(byte_level()).encode_text("") == [byte_level().bos_token_id]


def test_an_empty_text_without_a_first_token_is_refused() -> None:
    tokenizer = copy.copy(sentencepiece_like())
    tokenizer.bos_token = None
    with pytest.raises(RequestError, match="got an empty text, expected at least one token"):
        PromptEncoder(tokenizer).encode_text("")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(RequestError, match=r"prompt: got half of a UTF-16 pair \(\\ud83e\), expected whole characters"):
        PromptEncoder(byte_level()).encode_text("robot \ud83e")


@pytest.mark.parametrize("token_id", [-1, 8192, 10**30])
def test_an_id_outside_of_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match="expected ids from 0 to 8191"):
        PromptEncoder(byte_level()).check_ids([1, token_id])
