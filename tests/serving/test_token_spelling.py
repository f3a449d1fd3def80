"""One token as text and bytes."""

from __future__ import annotations

from typing import Any

import pytest

from metier.serving.detokenize import Detokenizer
from metier.serving.token_spelling import SpelledToken, TokenSpelling
from serving.made_tokenizers import KINDS, byte_level, sentencepiece_like


def spelling(tokenizer: Any) -> TokenSpelling:
    return TokenSpelling(tokenizer, Detokenizer(tokenizer))


@pytest.mark.parametrize(
    ("make", "name", "text"),
    [
        (byte_level, "Ġw", " w"),
        (byte_level, "Ã¶r", "ör"),
        (byte_level, "<|end|>", "<|end|>"),
        (sentencepiece_like, "▁Hello", " Hello"),
        (sentencepiece_like, "ld", "ld"),
        (sentencepiece_like, "▁", " "),
        (sentencepiece_like, "<0x41>", "A"),
        (KINDS["metaspace"], "▁wor", " wor"),
    ],
)
def test_a_token_is_spelled_with_its_blank(make: Any, name: str, text: str) -> None:
    spelled = spelling(make()).spell(make().convert_tokens_to_ids(name))
    assert spelled == SpelledToken(text, tuple(text.encode()))


@pytest.mark.parametrize(("make", "name", "raw"), [(byte_level, "ð", b"\xf0"), (sentencepiece_like, "<0xE2>", b"\xe2")])
def test_a_part_of_a_character_is_spelled_in_bytes(make: Any, name: str, raw: bytes) -> None:
    spelled = spelling(make()).spell(make().convert_tokens_to_ids(name))
    assert spelled == SpelledToken(f"bytes:\\x{raw[0]:02x}", tuple(raw))


def test_bytes_of_all_tokens_join_to_the_text() -> None:
    text, tokenizer = "naïve 🤖 “日本”", byte_level()
    spell = spelling(tokenizer).spell
    spelled = [spell(token_id) for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert b"".join(bytes(token.bytes or ()) for token in spelled).decode() == text


def test_an_id_beyond_the_tokenizer_has_a_name() -> None:
    assert spelling(byte_level()).spell(100_000) == SpelledToken("token:100000", None)
