"""The fast search finds exactly what a plain one finds."""

from __future__ import annotations

import random

import leaks
import pytest
from corpus import normalise
from leaks import sought, standing_in

WORDS = ["the", "tool", "größe", "reads", "файл", "and", "writes", "a", "library", "for", "you"]
TEXT = "A paragraph of a task, found anywhere."


@pytest.mark.parametrize("block_chars", [10, 1000, 4_000_000])
def test_the_search_agrees_with_a_plain_one(monkeypatch: pytest.MonkeyPatch, block_chars: int) -> None:
    monkeypatch.setattr(leaks, "BLOCK_CHARS", block_chars)
    draw = random.Random(1)
    documents = [" ".join(draw.choices(WORDS, k=40)) for _ in range(300)]
    texts = [document[start : start + 24] for document in documents[:50] for start in (0, 30, len(document) - 24)]
    texts = [normalise(text) for text in texts if len(normalise(text)) >= leaks.WINDOW_BYTES]
    texts += [" ".join(draw.choices(WORDS, k=5)) for _ in range(100)]
    texts = [text for text in texts if len(text.encode()) >= leaks.WINDOW_BYTES]
    expected = {text for text in texts if any(text in normalise(document) for document in documents)}
    assert 100 < len(expected) < len(set(texts))
    assert standing_in(documents, sought(texts)) == expected


@pytest.mark.parametrize(
    "document",
    [TEXT, f"before {TEXT}", f"{TEXT} after", f"glued{TEXT}glued", TEXT.upper(), TEXT.replace(" ", "\n\n  ")],
)
def test_a_text_is_found_wherever_it_stands(document: str) -> None:
    assert standing_in(["other", document, "other"], sought([TEXT])) == {normalise(TEXT)}


@pytest.mark.parametrize("block_chars", [20, 4_000_000])
@pytest.mark.parametrize("cut", [11, 14])
def test_a_text_that_reaches_over_two_documents_is_not_found(
    monkeypatch: pytest.MonkeyPatch, cut: int, block_chars: int
) -> None:
    monkeypatch.setattr(leaks, "BLOCK_CHARS", block_chars)
    assert standing_in([TEXT[:cut], TEXT[cut:]], sought([TEXT])) == set()


def test_texts_with_the_same_beginning_are_told_apart() -> None:
    assert standing_in([f"{TEXT} one"], sought([f"{TEXT} one", f"{TEXT} two"])) == {normalise(f"{TEXT} one")}


def test_nothing_sought_is_nothing_found() -> None:
    assert standing_in([TEXT], sought([])) == set()


def test_a_text_too_short_to_look_for_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot look for 'tiny text': it has 9 bytes, expected 16 or more"):
        sought(["tiny text"])
