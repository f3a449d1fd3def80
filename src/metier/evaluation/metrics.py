"""Task metrics: replies and references to one score on 0 to 100, with a score per item and a 95% interval.

Only measures that need no judge model and have a definition that others can repeat: exact match, JSON exact
match, ROUGE-L (package `rouge_score`) and chrF (package `sacrebleu`) here; final numbers, APIs and unit tests in files
of their own. A reply that cannot be read scores 0 and is counted, so that a format failure is never mistaken for a
wrong answer.
"""

# B resamples, N items, S statistics of one item

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from metier.errors import ConfigError, DataError
from metier.evaluation import code_tests
from metier.evaluation.api_calls import api_iou, call_iou
from metier.evaluation.bootstrap import NUM_RESAMPLES, Array, bootstrap_interval
from metier.evaluation.final_number import gsm8k
from metier.evaluation.item_scores import ItemScores, mean_of_items
from metier.evaluation.result import MetricScore

# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, bopomofo and CJK ideographs.
_UNSPACED = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
)
_ROUGE_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def exact_match(replies: Sequence[str], references: Sequence[str]) -> ItemScores:
    """100 where reply and reference are the same string after stripping white space at both ends, else 0."""
    return mean_of_items([100.0 * (a.strip() == b.strip()) for a, b in zip(replies, references, strict=True)])


def json_exact_match(replies: Sequence[str], references: Sequence[str]) -> ItemScores:
    """100 where reply and reference are the same JSON value, else 0; replies that are not JSON are counted.

    Order of keys and white space do not matter, order in arrays does; 1 equals 1.0 but not true. The reply
    must be JSON and nothing else: text or a code fence around it counts as unparsed.

    Raises:
        DataError: a reference is not JSON; then the task is broken, not the model.
    """
    items: list[float] = []
    num_unparsed = 0
    for position, (reply, reference) in enumerate(zip(replies, references, strict=True)):
        try:
            expected = _canonical(_parse_json(reference))
        except ValueError as error:
            raise DataError(
                f"test item {position}: the reference is not JSON ({error}): got {reference[:80]!r}.\n"
                "json_exact_match needs JSON references; mend the record or use exact_match."
            ) from error
        try:
            items.append(100.0 * (_canonical(_parse_json(reply)) == expected))
        except (ValueError, RecursionError):
            num_unparsed += 1
            items.append(0.0)
    return mean_of_items(items, num_unparsed=num_unparsed)


def _parse_json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON value")

    return json.loads(text, parse_constant=refuse)


def _canonical(value: Any) -> Any:
    """A comparable form in which true differs from 1, as in JSON and unlike in Python."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return (isinstance(value, bool), value)


class RougeTokenizer:
    """Words of any script, lower-cased; one token a character in scripts that put no space between words.

    On ASCII text this is rouge_score's own tokenizer. That one drops every other letter, so a Russian or
    Chinese reply would score 0 whatever it says, and "Größe" would be "gr" and "e".
    """

    def tokenize(self, text: str) -> list[str]:
        """Split `text` into the tokens whose longest common subsequence is measured."""
        return _ROUGE_TOKEN.findall(text.lower())


def rouge_l(replies: Sequence[str], references: Sequence[str]) -> ItemScores:
    """ROUGE-L: F-measure (×100) of the longest common subsequence of tokens, without stemming, mean over
    items.

    Source: Lin 2004; package rouge_score with `RougeTokenizer` in place of its ASCII tokenizer.
    """
    scorer = RougeScorer(["rougeL"], tokenizer=RougeTokenizer())
    return mean_of_items(
        [
            100.0 * float(scorer.score(reference, reply)["rougeL"].fmeasure)
            for reply, reference in zip(replies, references, strict=True)
        ]
    )


def chrf(replies: Sequence[str], references: Sequence[str]) -> ItemScores:
    """Corpus chrF2 of sacrebleu (character 1- to 6-grams, beta 2): n-gram counts are added over items, then
    scored.

    The items carry the sentence chrF2. The interval resamples items and recomputes the corpus score from
    their counts, as sacrebleu's own bootstrap does; the mean of sentence scores would be another quantity.

    Source: Popović 2015; package sacrebleu.
    """
    metric = CHRF()
    statistics_NS = np.asarray(metric._extract_corpus_statistics(list(replies), [list(references)]), dtype=np.float64)

    def interval(seed: int, num_resamples: int) -> tuple[float, float]:
        return bootstrap_interval(
            lambda counts_BN: _chrf_of_counts(counts_BN @ statistics_NS),
            num_items=len(statistics_NS),
            seed=seed,
            num_resamples=num_resamples,
        )

    return ItemScores(
        value=float(metric.corpus_score(list(replies), [list(references)]).score),
        items=tuple(float(score) for score in _chrf_of_counts(statistics_NS)),
        interval=interval,
    )


def _chrf_of_counts(statistics_BS: Array) -> Array:
    """chrF2 of rows of [reply, reference, match] counts of each n-gram order, as sacrebleu computes it."""
    replies, references, matches = (statistics_BS[:, offset::3] for offset in range(3))
    counted = (replies > 0) & (references > 0)
    orders = np.maximum(counted.sum(axis=1), 1)
    precision = np.where(counted, matches / np.maximum(replies, 1), 0).sum(axis=1) / orders
    recall = np.where(counted, matches / np.maximum(references, 1), 0).sum(axis=1) / orders
    factor = float(CHRF.BETA**2)
    weighted = factor * precision + recall
    score: Array = np.divide(
        100 * (1 + factor) * precision * recall, weighted, out=np.zeros_like(weighted), where=weighted > 0
    )
    return score


Extras = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How replies are scored, and what that takes."""

    score: Callable[[Sequence[str], Sequence[str], Extras], ItemScores]
    """(replies, references, further keys of the records) → scores."""
    record_keys: tuple[str, ...] = ()
    """Keys of a record, beside its messages, that the metric reads."""
    runs_code: bool = False
    """It runs what the model wrote, so the caller must allow it."""


def _of_text(score: Callable[[Sequence[str], Sequence[str]], ItemScores]) -> Metric:
    return Metric(score=lambda replies, references, _: score(replies, references))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "exact_match": _of_text(exact_match),
        "json_exact_match": _of_text(json_exact_match),
        "rouge_l": _of_text(rouge_l),
        "chrf": _of_text(chrf),
        "gsm8k": _of_text(gsm8k),
        "api_iou": _of_text(api_iou),
        "call_iou": _of_text(call_iou),
        "code_tests": Metric(
            score=lambda replies, _, extras: code_tests.code_tests(replies, extras),
            record_keys=code_tests.RECORD_KEYS,
            runs_code=True,
        ),
    }
)


def check_metric_names(metrics: Sequence[str], *, where: str) -> None:
    """Raise ConfigError where `metrics` is empty or names a metric that metier does not have."""
    if not metrics:
        raise ConfigError(f"{where}: no metric given. Name at least one of: {', '.join(METRICS)}.")
    for metric in metrics:
        if metric not in METRICS:
            near = difflib.get_close_matches(metric, METRICS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown metric {metric!r}.{hint} Known metrics: {', '.join(METRICS)}.")


def check_code_execution(metrics: Sequence[str], *, allowed: bool) -> None:
    """Raise ConfigError where a metric would run code that the model wrote and nobody allowed it."""
    for metric in metrics:
        if METRICS[metric].runs_code and not allowed:
            raise ConfigError(
                f"metric {metric!r} runs code that the model wrote, which is off unless asked for.\n"
                "In a container or a virtual machine, give allow_code_execution=True (--allow-code-execution)."
            )


def score_replies(
    metric: str,
    replies: Sequence[str],
    references: Sequence[str],
    *,
    extras: Extras | None = None,
    allow_code_execution: bool = False,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> MetricScore:
    """Score N replies against N references by a metric's name.

    Args:
        metric: one of METRICS.
        replies: what the model wrote.
        references: what was expected.
        extras: further keys of each record, for metrics that have `record_keys`.
        allow_code_execution: whether a metric may run code from the replies.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Raises:
        ConfigError: the metric is unknown, or runs code and may not.
        DataError: there is nothing to score, or a record lacks what the metric needs.
    """
    check_metric_names([metric], where="score_replies")
    check_code_execution([metric], allowed=allow_code_execution)
    if not replies:
        raise DataError(f"{metric}: got 0 replies, expected at least one. Give a split that has records.")
    scores = METRICS[metric].score(replies, references, [{} for _ in replies] if extras is None else extras)
    low, high = scores.interval(seed, num_resamples)
    return MetricScore(
        metric=metric,
        value=scores.value,
        low=low,
        high=high,
        item_scores=scores.items,
        num_unparsed=scores.num_unparsed,
    )
