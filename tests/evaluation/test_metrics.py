"""Task metrics against hand-counted values and the packages they stand on."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from metier.errors import ConfigError, DataError
from metier.evaluation.metrics import METRICS, RougeTokenizer, check_metric_names, score_replies
from metier.evaluation.result import MetricScore

REPLIES = ["den hurtige ræv", "hunden sover nu", "x", "", "en to tre fire fem", "abc"]
REFERENCES = ["den hurtige brune ræv", "hunden sover", "y", "noget", "en to tre fire fem", "ab"]


def test_exact_match_ignores_white_space_at_the_ends_only() -> None:
    score = score_replies("exact_match", [" a b\n", "a  b", "A b"], ["a b", "a b", "a b"])
    assert score.item_scores == (100.0, 0.0, 0.0)
    assert score.value == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [
        ('{"b": [1, 2], "a": "x"}', '{"a":"x","b":[1,2]}', 100.0),
        ('{"b": [2, 1]}', '{"b": [1, 2]}', 0.0),
        ('{"a": 1}', '{"a": true}', 0.0),
        ('{"a": [0]}', '{"a": [false]}', 0.0),
        ('{"a": 1.0}', '{"a": 1}', 100.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ('{"a": 1, "b": 2}', '{"a": 1}', 0.0),
    ],
)
def test_json_compares_values(reply: str, reference: str, expected: float) -> None:
    score = score_replies("json_exact_match", [reply], [reference])
    assert (score.value, score.num_unparsed) == (expected, 0)


@pytest.mark.parametrize(
    "reply", ["", "{'a': 1}", 'Sure: {"a": 1}', '```json\n{"a": 1}\n```', '{"a": NaN}', "[" * 100_000]
)
def test_a_reply_that_is_not_json_scores_0_and_is_counted(reply: str) -> None:
    score = score_replies("json_exact_match", [reply, '{"a": 1}'], ['{"a": 1}', '{"a": 1}'])
    assert score.item_scores == (0.0, 100.0)
    assert score.num_unparsed == 1


def test_a_reference_that_is_not_json_is_the_tasks_fault() -> None:
    with pytest.raises(DataError, match=r"test item 1: the reference is not JSON .*got 'nope'"):
        score_replies("json_exact_match", ["1", "2"], ["1", "nope"])


def test_rouge_l_of_a_hand_counted_pair() -> None:
    # Longest common subsequence "the dog runs": 3 of 4 reply tokens and 3 of 5 reference tokens.
    score = score_replies("rouge_l", ["The dog quickly runs."], ["the big dog often runs"])
    assert score.value == pytest.approx(100 * 2 * 0.75 * 0.6 / (0.75 + 0.6))


@pytest.mark.parametrize("text", ["It's 3.5 GB, isn't_it?", "  ", "Perl/XS bindings for libfoo2 (dev)"])
def test_ascii_text_scores_as_in_rouge_score(text: str) -> None:
    theirs = RougeScorer(["rougeL"]).score("It is 3 GB of perl isn it", text)["rougeL"].fmeasure
    assert score_replies("rouge_l", [text], ["It is 3 GB of perl isn it"]).value == pytest.approx(100 * theirs)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Größe über", ["größe", "über"]),
        ("Что это?", ["что", "это"]),
        ("我爱 AI 编程", ["我", "爱", "ai", "编", "程"]),
        ("カタ語", ["カ", "タ", "語"]),
    ],
)
def test_rouge_l_sees_the_words_of_other_scripts(text: str, tokens: list[str]) -> None:
    assert RougeTokenizer().tokenize(text) == tokens
    assert score_replies("rouge_l", [text], [text]).value == 100.0


def test_chrf_is_sacrebleus_corpus_score_and_its_items_are_sentence_scores() -> None:
    score = score_replies("chrf", REPLIES, REFERENCES)
    assert score.value == pytest.approx(CHRF().corpus_score(REPLIES, [REFERENCES]).score)
    sentences = [CHRF().sentence_score(a, [b]).score for a, b in zip(REPLIES, REFERENCES, strict=True)]
    assert score.item_scores == pytest.approx(sentences)
    assert len(set(sentences)) > 3


def test_the_chrf_interval_is_that_of_the_corpus_score() -> None:
    score = score_replies("chrf", REPLIES, REFERENCES, seed=7, num_resamples=200)
    resampled = []
    for drawn in np.random.default_rng(7).integers(0, len(REPLIES), size=(200, len(REPLIES))):
        references = [REFERENCES[index] for index in drawn]
        resampled.append(CHRF().corpus_score([REPLIES[index] for index in drawn], [references]).score)
    assert (score.low, score.high) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])))


RIGHT_AND_WRONG = {
    **dict.fromkeys(METRICS, ('{"a": "eins zwei"}', "[0]")),
    "gsm8k": ("#### 12", "#### 13"),
    "api_iou": ("a, b, c", "d, e, f"),
    "call_iou": ("f(a=1)", "g(a=1)"),
    "code_tests": ("x = 1", "x = 2"),
}


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_every_metric_spans_0_to_100_with_its_interval_around_it(metric: str) -> None:
    count = 4 if METRICS[metric].runs_code else 30

    def score(replies: list[str]) -> MetricScore:
        extras = [{"tests": "assert x == 1"}] * len(replies)
        references = [RIGHT_AND_WRONG[metric][0]] * len(replies)
        return score_replies(metric, replies, references, extras=extras, allow_code_execution=True)

    right, wrong = ([text] * count for text in RIGHT_AND_WRONG[metric])
    mixed = score(right + wrong)
    assert score(right).value == pytest.approx(100)
    assert score(wrong).value == pytest.approx(0, abs=1e-6)
    assert mixed.low < mixed.value < mixed.high
    assert len(mixed.item_scores) == 2 * count


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"here: unknown metric 'rougel'\. Did you mean 'rouge_l'\? Known"):
        check_metric_names(["chrf", "rougel"], where="here")


def test_no_metric_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="here: no metric given"):
        check_metric_names([], where="here")


def test_scoring_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="chrf: got 0 replies"):
        score_replies("chrf", [], [])
