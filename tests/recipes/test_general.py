"""Held-out text and cloze items: cut at lines, unseen, with fair distractors."""

from __future__ import annotations

import random

import general
import pytest
from general import Ending, cloze_items, cut, endings, long_paragraphs, sample


def test_a_long_document_is_cut_at_a_line() -> None:
    lines = [f"{number:03} {'x' * 60}" for number in range(100)]
    text = cut("\n".join(lines) + "\n")
    assert text.split("\n") == lines[: len(text.split("\n"))]
    assert general.DOCUMENT_CHARS - 65 < len(text) <= general.DOCUMENT_CHARS
    assert cut("short\n\ntext\n") == "short\n\ntext"
    assert len(cut("x" * 5000)) == general.DOCUMENT_CHARS


def test_a_document_with_a_seen_paragraph_is_left_out() -> None:
    documents = [f"Document {number}.\n\n{'word ' * 200}{number}" for number in range(60)]
    (seen,) = long_paragraphs(documents[1])
    chosen, rest = sample(documents, {seen})
    assert documents[1] not in chosen
    assert chosen == [documents[0], *documents[2 : len(chosen) + 1]]
    assert rest == documents[len(chosen) + 1 :]
    assert general.BYTES_PER_DOMAIN <= sum(map(len, chosen)) < general.BYTES_PER_DOMAIN + 1100


def test_too_little_unseen_text_is_refused() -> None:
    with pytest.raises(ValueError, match="got 9 bytes of unseen held-out text, expected 28000"):
        sample(["some text"], set())


def test_an_ending_reaches_the_end_of_a_sentence_or_line_and_continues_its_context() -> None:
    document = "One two three four five six seven eight nine ten. Eleven twelve thirteen fourteen\nfifteen words"
    found = endings(document, 7, min_context_words=3, draw=random.Random(0))
    assert {ending.option.split()[-1] for ending in found} == {"ten.", "fourteen"}
    for ending in found:
        assert f"{ending.context} {ending.option}" in document
        assert 4 <= len(ending.option.split()) <= 6
        assert len(ending.context.split()) >= 3
        assert ending.document == 7


def test_cloze_options_are_alike_from_other_documents_and_balanced() -> None:
    words = ["alpha", "bravo", "delta", "hotel", "india", "karat"]
    found = [
        Ending(context=f"context {n}", option=" ".join(random.Random(n).choices(words, k=5)) + ".", document=n // 40)
        for n in range(200)
    ]
    document_of = {ending.option: ending.document for ending in found}
    items = list(cloze_items("prose", found, seen=set()))
    assert len(items) == general.ITEMS_PER_DOMAIN
    answers = [item["answer"] for item in items]
    assert {answers.count(position) for position in range(4)} == {general.ITEMS_PER_DOMAIN // 4}
    for item in items:
        right = item["options"][item["answer"]]
        (ending,) = (e for e in found if e.context == item["context"])
        assert ending.option == right
        assert len(set(item["options"])) == 4
        assert all(document_of[option] != ending.document for option in item["options"] if option != right)
    assert len({item["options"][item["answer"]] for item in items}) == len(items)


def test_a_seen_continuation_is_no_item() -> None:
    found = [Ending(context=f"context {n}", option=f"option w{n:02} in here.", document=n) for n in range(60)]
    seen = {f"context {n} option w{n:02} in here." for n in range(10)}
    with pytest.raises(ValueError, match="prose: 6 of 56 cloze items are missing"):
        list(cloze_items("prose", found, seen))
