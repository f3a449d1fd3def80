"""Pieces of text join to the whole decode, whatever the tokens and the tokenizer's kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.serving.detokenize import Detokenizer
from serving.made_tokenizers import KINDS, byte_level, sentencepiece_like

DETOKENIZERS = {name: Detokenizer(make()) for name, make in KINDS.items()}
TEXT = "Wörld – «naïve» 日本語 🤖👩‍👩‍👧 \t\n  end. "


def pieces(kind: str, token_ids: list[int]) -> list[str]:
    text = DETOKENIZERS[kind].begin()
    return [*(text.push(token_id) for token_id in token_ids), text.finish()]


def whole(kind: str, token_ids: list[int]) -> str:
    return str(KINDS[kind]().decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_of_any_tokens_join_to_the_whole_decode(kind: str, data: st.DataObject) -> None:
    ids = st.integers(0, len(KINDS[kind]()) - 1)
    if kind == "byte_level":
        # single bytes and special tokens, which are rare among all, are where it is hard
        ids = st.one_of(ids, st.integers(0, 262))
    token_ids = data.draw(st.lists(ids, max_size=40))
    assert "".join(pieces(kind, token_ids)) == whole(kind, token_ids)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_of_any_bytes_join_to_the_whole_decode(values: list[int]) -> None:
    tokenizer = sentencepiece_like()
    token_ids = tokenizer.convert_tokens_to_ids([f"<0x{value:02X}>" for value in values])
    assert "".join(pieces("sentencepiece_like", token_ids)) == whole("sentencepiece_like", token_ids)


@given(st.text(max_size=60))
def test_pieces_of_a_text_join_to_the_text(text: str) -> None:
    token_ids = byte_level()(text, add_special_tokens=False)["input_ids"]
    if set(token_ids) & DETOKENIZERS["byte_level"].special_ids:
        return
    assert "".join(pieces("byte_level", token_ids)) == text


def test_no_piece_has_half_a_character() -> None:
    token_ids = byte_level()(TEXT, add_special_tokens=False)["input_ids"]
    assert len(token_ids) > len(TEXT.split())
    assert all("�" not in piece for piece in pieces("byte_level", token_ids))
    assert "".join(pieces("byte_level", token_ids)) == TEXT


def test_a_text_comes_as_soon_as_it_is_settled() -> None:
    token_ids = byte_level()("one two three", add_special_tokens=False)["input_ids"]
    assert all(pieces("byte_level", token_ids)[: len(token_ids)])


def test_bytes_that_are_no_character_do_not_hold_back_what_follows() -> None:
    first_byte = byte_level().convert_tokens_to_ids("ð")
    assert pieces("byte_level", [first_byte, first_byte, first_byte]) == ["", "�", "�", "�"]


def test_a_blank_between_words_is_kept_and_the_first_dropped() -> None:
    hello, special = sentencepiece_like().convert_tokens_to_ids(["▁Hello", "</s>"])
    assert pieces("sentencepiece_like", [hello, special, hello]) == ["Hello", "", " Hello", ""]


def test_a_run_of_bytes_comes_when_it_is_over() -> None:
    first, second, word = sentencepiece_like().convert_tokens_to_ids(["<0xC3>", "<0xB1>", "a"])
    assert pieces("sentencepiece_like", [first, second, word]) == ["", "", "ña", ""]


def test_a_special_token_between_bytes_does_not_part_them() -> None:
    first, second, third, special = sentencepiece_like().convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>", "</s>"])
    assert pieces("sentencepiece_like", [first, second, special, third]) == ["", "", "", "", "€"]


def test_an_id_beyond_the_tokenizer_has_no_text() -> None:
    word = byte_level().convert_tokens_to_ids("ello")
    assert pieces("byte_level", [word, 100_000, word]) == ["ello", "", "ello", ""]


def test_special_tokens_have_no_text() -> None:
    end = byte_level().convert_tokens_to_ids("<|end|>")
    assert pieces("byte_level", [end, end]) == ["", "", ""]
