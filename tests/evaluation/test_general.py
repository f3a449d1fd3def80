"""Held-out loss counts every byte and token once; the cloze test finds the likelier option per byte."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from metier import embedded
from metier.errors import ConfigError, DataError
from metier.evaluation import general
from metier.evaluation.general import (
    ClozeItem,
    cloze_score,
    domain_files,
    domain_loss,
    load_cloze,
    read_documents,
)

TEXTS = ["the quick brown fox jumps over the lazy dog", "größer als gut", "что это такое\nand the dog"]
# One float32 forward pass against another of a different batch shape.
RELATIVE_TOLERANCE = 1e-5


def test_documents_are_separated_by_a_line_of_its_own_and_keep_their_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "\none\n\nline\n<|endoftext|> \n  two <|endoftext|>\n<|endoftext|>\n\n<|endoftext|>\nthree\n",
        encoding="utf-8",
    )
    assert read_documents(path) == ["one\n\nline", "  two <|endoftext|>", "three"]


def test_a_file_without_separators_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_documents(path) == ["one\n\ntwo"]


@pytest.mark.parametrize(
    ("max_bytes", "documents"),
    [(1, ["a"]), (4, ["aé"]), (6, ["aéz", "bc"]), (9, ["aéz", "bcd"]), (5, ["aéz", "b"])],
)
def test_a_byte_limit_cuts_the_last_document_between_characters(
    tmp_path: Path, max_bytes: int, documents: list[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aéz\n<|endoftext|>\nbcd\n", encoding="utf-8")
    if max_bytes == 4:  # a, two bytes of é, z
        documents = ["aéz"]
    assert read_documents(path, max_bytes=max_bytes) == documents
    assert sum(len(document.encode()) for document in documents) <= max_bytes


def test_a_character_that_does_not_fit_is_left_out_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aéz\n", encoding="utf-8")
    assert read_documents(path, max_bytes=2) == ["a"]


def test_bits_per_byte_is_the_plain_sum_over_tokens_and_bytes(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    bits, num_tokens = [], 0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        num_tokens += len(ids) - 1
        with torch.inference_mode():
            log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        bits.append(-sum(float(log_probabilities[i - 1, ids[i]]) for i in range(1, len(ids))) / math.log(2))
    with torch.inference_mode():
        loss = domain_loss(model, tokenizer, TEXTS)
    assert loss.document_bits == pytest.approx(bits, rel=RELATIVE_TOLERANCE)
    assert loss.document_bytes == tuple(len(text.encode()) for text in TEXTS)
    assert loss.num_tokens == num_tokens
    assert loss.bits_per_byte == pytest.approx(sum(bits) / sum(loss.document_bytes), rel=RELATIVE_TOLERANCE)
    assert loss.low <= loss.bits_per_byte <= loss.high


def test_a_model_that_knows_nothing_pays_log2_of_its_vocabulary_for_each_token(
    make_model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.inference_mode():
        loss = domain_loss(model, tokenizer, TEXTS * 3, window_tokens=8)
    expected = loss.num_tokens * math.log2(model.config.vocab_size) / sum(loss.document_bytes)
    assert loss.bits_per_byte == pytest.approx(expected, rel=RELATIVE_TOLERANCE)


@settings(max_examples=200, deadline=None)
@given(num_tokens=st.integers(2, 300), window_tokens=st.integers(2, 64))
def test_windows_score_each_token_once_with_context(num_tokens: int, window_tokens: int) -> None:
    scored = []
    for index, window in enumerate(general._windows(range(num_tokens), window_tokens)):
        assert 1 <= window.start < len(window.token_ids) <= window_tokens
        assert index == 0 or window.start >= max(1, window_tokens // 4)
        scored += window.token_ids[window.start :]
    assert scored == list(range(1, num_tokens))


def test_losses_on_different_text_have_different_fingerprints(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.inference_mode():
        first, second = (domain_loss(model, tokenizer, [text]).fingerprint for text in ("ab c", "ab d"))
    assert first != second


def test_a_tokenizer_without_start_token_is_refused(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Bare:
        bos_token_id = eos_token_id = None
        name_or_path = "bare"

    with pytest.raises(DataError, match="tokenizer 'bare': no bos and no eos token"):
        domain_loss(model, Bare(), ["a"])  # type: ignore[arg-type]


def test_the_embedded_domains_and_cloze_items_can_be_read() -> None:
    files = domain_files(embedded.general_path())
    assert len(files) >= 5
    for path in files.values():
        documents = read_documents(path)
        assert len(documents) >= 10
        assert "<|endoftext|>" not in "".join(documents)
    assert len(load_cloze(embedded.cloze_path())) >= 500


def test_a_folder_without_domains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no <domain>\.txt file"):
        domain_files(tmp_path)


def test_a_domain_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n<|endoftext|>\n")
    with pytest.raises(DataError, match=r"a\.txt: got 0 documents"):
        read_documents(tmp_path / "a.txt")


def test_a_domain_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as UTF-8"):
        read_documents(tmp_path / "a.txt")


def test_a_byte_limit_of_0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="general_bytes must be at least 1, got 0"):
        read_documents(tmp_path / "a.txt", max_bytes=0)


def item(context: str, *options: str, answer: int = 0) -> ClozeItem:
    return ClozeItem(context=context, options=options, answer=answer, domain="d", origin="cloze.jsonl:1")


def test_the_likelier_option_per_byte_wins(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    # Plain sums prefer "b" (3 nats) over "aaaa" (4 nats); per byte it is 3 against 1.
    monkeypatch.setattr(general, "continuation_losses", lambda model, items: [[4.0, 3.0], [3.0, 4.1]])
    items = [item("x", "aaaa", "b", answer=0), item("x", "c", "dd", answer=0)]
    score = cloze_score(None, tokenizer, items)  # type: ignore[arg-type]
    assert score.item_scores == (100.0, 0.0)
    assert (score.accuracy, score.chance) == (50.0, 50.0)


def test_cloze_agrees_with_a_plain_loop(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    items = [
        item("the quick brown", " fox", " dog", " lazy", " why not"),
        item("the lazy", " dog and", " fox", " что", " x", answer=2),
        item("größer als", " gut", " the fox", " und", " 42", answer=3),
    ]
    expected = []
    for one in items:
        per_byte = []
        context_ids = [tokenizer.bos_token_id, *tokenizer(one.context)["input_ids"]]
        for option in one.options:
            ids = context_ids + tokenizer(option)["input_ids"]
            assert ids == [tokenizer.bos_token_id, *tokenizer(one.context + option)["input_ids"]]
            with torch.inference_mode():
                log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = sum(float(log_probabilities[i - 1, ids[i]]) for i in range(len(context_ids), len(ids)))
            per_byte.append(total / len(option.encode()))
        expected.append(100.0 * (per_byte.index(max(per_byte)) == one.answer))
    with torch.inference_mode():
        assert list(cloze_score(model, tokenizer, items).item_scores) == expected
        rotated = [
            ClozeItem(
                context=one.context,
                options=(*one.options[1:], one.options[0]),
                answer=(one.answer - 1) % 4,
                domain="d",
                origin="",
            )
            for one in items
        ]
        assert list(cloze_score(model, tokenizer, rotated).item_scores) == expected


def scored_text(one: ClozeItem, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(ids) for ids in general._continuations(one, tokenizer).continuation_ids]


def test_scored_is_the_option_and_not_its_context(tokenizer: PreTrainedTokenizerFast) -> None:
    assert scored_text(item("the quick", "brown", "lazy"), tokenizer) == [" brown", " lazy"]
    assert scored_text(item("the quick ", "brown", "lazy"), tokenizer)[0].strip() == "brown"
    assert scored_text(item("the quick", " brown", " lazy"), tokenizer) == [" brown", " lazy"]


def test_the_whole_context_stands_before_each_option(tokenizer: PreTrainedTokenizerFast) -> None:
    made = general._continuations(item("the quick brown", "fox", "dog"), tokenizer)
    assert tokenizer.decode(made.context_ids) == "<bos>the quick brown"


def test_a_token_across_the_seam_is_scored_for_every_option(tokenizer: PreTrainedTokenizerFast) -> None:
    # After "the " the options merge with the space before them: the seam moves to where all agree.
    merged = scored_text(item("the ", "quick", "lazy", "9"), tokenizer)
    assert merged == [" quick", " lazy", " 9"]


def test_what_options_share_is_scored_too(tokenizer: PreTrainedTokenizerFast) -> None:
    assert scored_text(item("why", " the fox", " the dog"), tokenizer) == [" the fox", " the dog"]


def test_an_option_without_context_needs_a_start_token(tokenizer: PreTrainedTokenizerFast) -> None:
    class Bare:
        bos_token_id = eos_token_id = None

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}

    assert scored_text(item("", "the fox", "dog"), tokenizer) == ["the fox", "dog"]
    with pytest.raises(DataError, match=r"cloze\.jsonl:1: an option starts the text, expected a context"):
        general._continuations(item("", "fox", "dog"), Bare())  # type: ignore[arg-type]


def test_an_option_that_begins_another_keeps_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(scored_text(item("so ", "x", "xx", "xxx"), tokenizer))


def test_a_limit_takes_cloze_items_evenly(tmp_path: Path) -> None:
    path = tmp_path / "cloze.jsonl"
    path.write_text(
        "\n".join(json.dumps({"context": str(i), "options": ["a", "b"], "answer": 0, "domain": "d"}) for i in range(10))
    )
    assert [one.context for one in load_cloze(path, limit=5)] == ["0", "2", "4", "6", "8"]
    assert len(load_cloze(path)) == len(load_cloze(path, limit=99)) == 10
    with pytest.raises(ConfigError, match="cloze_items must be at least 1, got 0"):
        load_cloze(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"cloze\.jsonl:2: not a cloze item"),
        ('{"context": "a", "options": ["b", "c"], "domain": "d"}', r"cloze\.jsonl:2: .*answer"),
        (
            '{"context": "a", "options": ["b", "c"], "answer": 2, "domain": "d"}',
            "answer 2 is no index into 2",
        ),
        (
            '{"context": "a", "options": ["b", "b"], "answer": 1, "domain": "d"}',
            "two or more different options",
        ),
    ],
)
def test_a_cloze_line_with_a_mistake_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "cloze.jsonl"
    path.write_text('{"context": "a", "options": ["b", "c"], "answer": 0, "domain": "d"}\n' + line)
    with pytest.raises(DataError, match=message):
        load_cloze(path)


def test_a_cloze_file_without_items_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cloze.jsonl").write_text("\n")
    with pytest.raises(DataError, match="got 0 cloze items"):
        load_cloze(tmp_path / "cloze.jsonl")
