"""The held-out text that ships: enough of every domain, and a cloze test that position does not give away."""

from __future__ import annotations

from collections import Counter

import pytest

from metier import embedded
from metier.evaluation.general import load_cloze, read_documents

LEAST_ITEMS = 540


@pytest.mark.parametrize("domain", embedded.general_domains())
def test_a_domain_has_many_documents_of_about_28_kilobytes(domain: str) -> None:
    documents = read_documents(embedded.general_path(domain))
    assert 24_000 <= sum(len(document.encode()) for document in documents) <= 32_000
    assert len(documents) >= 18
    assert len(set(documents)) == len(documents)
    assert max(map(len, documents)) <= 1500


def test_documents_keep_their_blank_lines() -> None:
    assert any("\n\n\n" in document for document in read_documents(embedded.general_path("python")))


def test_cloze_items_have_four_options_and_no_favoured_position() -> None:
    items = load_cloze(embedded.cloze_path())
    assert len(items) >= LEAST_ITEMS
    assert {len(item.options) for item in items} == {4}
    assert set(Counter(item.answer for item in items).values()) == {len(items) // 4}
    assert {item.domain for item in items} == set(embedded.general_domains())
    assert len({item.context for item in items}) == len(items)


def test_cloze_options_do_not_give_themselves_away_by_length() -> None:
    items = load_cloze(embedded.cloze_path())
    is_longest = [item.answer == max(range(4), key=lambda i: len(item.options[i])) for item in items]
    assert 0.1 < sum(is_longest) / len(items) < 0.4
