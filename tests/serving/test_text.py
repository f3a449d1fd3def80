"""Answers as text: stop strings over tokens, and the tokens that stand beside each piece."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from metier.serving.contract import GeneratedToken
from metier.serving.detokenize import Detokenizer
from metier.serving.text import AnswerText, TextPiece
from serving.made_tokenizers import byte_level

DETOKENIZER = Detokenizer(byte_level())


def answered(text: str, stops: list[str]) -> tuple[list[TextPiece], AnswerText]:
    answer = AnswerText(DETOKENIZER, stops)
    pieces = []
    for token_id in byte_level()(text, add_special_tokens=False)["input_ids"]:
        pieces.append(answer.push(GeneratedToken(token_id)))
        if answer.is_stopped:
            break
    return [*pieces, answer.finish()], answer


def text_of(pieces: list[TextPiece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_stop_string_over_several_tokens_ends_the_answer_before_it() -> None:
    pieces, answer = answered("The answer is 42.\n\nNext question: why?", ["42.\n\nNext quest"])
    assert answer.is_stopped
    assert text_of(pieces) == "The answer is "


@given(st.text("aé🤖\n", max_size=30), st.lists(st.text("aé🤖\n", min_size=1, max_size=4), max_size=4))
def test_the_text_is_the_whole_text_up_to_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, answer = answered(text, stops)
    got = text_of(pieces)
    assert text.startswith(got)
    assert answer.is_stopped == any(stop in text for stop in stops)
    assert not any(stop in got for stop in stops)
    if not answer.is_stopped:
        assert got == text


def test_text_that_only_began_like_a_stop_string_comes_in_the_end() -> None:
    pieces, answer = answered("yes EN", ["END"])
    assert not answer.is_stopped
    assert text_of(pieces) == "yes EN"
    assert "EN" not in text_of(pieces[:-1])


def test_tokens_of_a_stop_string_are_not_given_out() -> None:
    pieces, _ = answered("one two END", [" END"])
    tokens = [token for piece in pieces for token in piece.tokens]
    assert text_of(pieces) == "one two"
    assert DETOKENIZER.decode([token.token.token_id for token in tokens]) == "one two"


def test_every_token_of_an_answer_that_was_not_stopped_is_given_out_once() -> None:
    text = "naïve 🤖 END"
    pieces, _ = answered(text, ["ENDE"])
    token_ids = [token.token.token_id for piece in pieces for token in piece.tokens]
    assert token_ids == byte_level()(text, add_special_tokens=False)["input_ids"]


def test_offsets_say_where_a_tokens_text_begins() -> None:
    pieces, _ = answered("one two three", [])
    tokens = [token for piece in pieces for token in piece.tokens]
    for token, after in itertools.pairwise(tokens):
        spelled = DETOKENIZER.decode([token.token.token_id])
        assert "one two three"[token.offset : after.offset] == spelled


def test_a_special_token_comes_with_the_end() -> None:
    answer = AnswerText(DETOKENIZER)
    end = byte_level().convert_tokens_to_ids("<|end|>")
    assert answer.push(GeneratedToken(end)) == TextPiece("", ())
    assert [token.token.token_id for token in answer.finish().tokens] == [end]
