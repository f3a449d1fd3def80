"""Evaluations as plain values: files, and differences between two of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metier.errors import ConfigError, DataError
from metier.evaluation.bootstrap import mean_interval
from metier.evaluation.metrics import score_replies
from metier.evaluation.result import (
    ClozeScore,
    DomainLoss,
    Evaluation,
    MetricScore,
    SampleReply,
    forgetting,
    gain,
)


def loss(bits: list[float], sizes: list[int], fingerprint: str = "t") -> DomainLoss:
    value = sum(bits) / sum(sizes)
    return DomainLoss(
        bits_per_byte=value,
        low=value,
        high=value,
        document_bits=tuple(bits),
        document_bytes=tuple(sizes),
        num_tokens=9,
        fingerprint=fingerprint,
    )


def evaluation(**changes: Any) -> Evaluation:
    score = score_replies("exact_match", ["a", "b"], ["a", "x"])
    base = Evaluation(
        task="t",
        split="test",
        num_items=2,
        num_cut=1,
        fingerprint="f",
        metrics={"exact_match": score},
        samples=(SampleReply(prompt="<é>", reference="r", reply="s", origin="o:1"),),
        domains={"a": loss([10, 20], [10, 10]), "b": loss([6, 9], [2, 1], "u")},
        cloze=ClozeScore(accuracy=50, low=0, high=100, chance=25, item_scores=(100.0, 0.0)),
        seconds={"task": 1.5},
        settings={"limit": None},
    )
    return dataclasses.replace(base, **changes)


def metric(scores: list[float]) -> MetricScore:
    value = float(np.mean(scores))
    return MetricScore(metric="exact_match", value=value, low=value, high=value, item_scores=tuple(scores))


def test_saving_then_loading_is_identity(tmp_path: Path) -> None:
    path = tmp_path / "run" / "evaluation.json"
    evaluation().save(path)
    assert Evaluation.load(path) == evaluation()
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", [field.name for field in dataclasses.fields(Evaluation)])
def test_a_missing_key_is_named(missing: str) -> None:
    values = evaluation().to_dict()
    del values[missing]
    with pytest.raises(DataError, match=f"not a complete evaluation .*{missing}"):
        Evaluation.from_dict(values)


def test_an_unknown_key_is_named() -> None:
    values = json.loads(json.dumps(evaluation().to_dict()))
    values["domains"]["a"]["bites"] = 1
    with pytest.raises(DataError, match="bites"):
        Evaluation.from_dict(values)


def test_another_format_is_refused() -> None:
    with pytest.raises(DataError, match="evaluation: got format 2, expected 1"):
        Evaluation.from_dict({**evaluation().to_dict(), "format": 2})


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "got a JSON list"), (None, "read")])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "evaluation.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=rf"evaluation\.json: .*{message}"):
        Evaluation.load(path)


def test_domains_count_equally() -> None:
    assert evaluation().bits_per_byte == pytest.approx((1.5 + 5.0) / 2)
    assert evaluation(domains={}).bits_per_byte is None


def test_the_first_metric_leads() -> None:
    scores = {"chrf": metric([1.0]), "exact_match": metric([2.0])}
    assert evaluation(metrics=scores).score is scores["chrf"]
    assert evaluation(metrics={}).score is None


def test_gain_is_the_difference_of_scores_with_a_paired_interval() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0, 80, 200)
    after = before + generator.normal(10, 1, 200)
    change = gain(
        evaluation(metrics={"exact_match": metric(before.tolist())}),
        evaluation(metrics={"exact_match": metric(after.tolist())}),
    )
    assert change.value == pytest.approx(after.mean() - before.mean())
    assert change.low < change.value < change.high
    # Unpaired, the spread of the items (23 points) would give an interval of about 9.
    assert change.high - change.low < 0.5


def test_gain_of_a_corpus_metric_is_centred_on_the_corpus_scores() -> None:
    references = ["a short one", "another that is far longer than the first of the two " * 3]
    before = score_replies("chrf", ["a short", "nothing"], references)
    after = score_replies("chrf", ["nothing", references[1]], references)
    change = gain(evaluation(metrics={"chrf": before}), evaluation(metrics={"chrf": after}))
    differences = np.subtract(after.item_scores, before.item_scores)
    low, high = mean_interval(differences.tolist(), seed=0)
    shift = after.value - before.value - differences.mean()
    assert abs(shift) > 5
    assert change.value == pytest.approx(after.value - before.value)
    assert (change.low, change.high) == pytest.approx((low + shift, high + shift))


def test_gain_needs_the_same_items() -> None:
    with pytest.raises(ConfigError, match=r"different items \(t/test, 2 items, and t/validation, 2 items\)"):
        gain(evaluation(), evaluation(split="validation", fingerprint="g"))


@pytest.mark.parametrize("name", ["chrf", None])
def test_gain_needs_the_metric_in_both(name: str | None) -> None:
    before = evaluation() if name else evaluation(metrics={})
    with pytest.raises(ConfigError, match="is not in both evaluations"):
        gain(before, evaluation(), metric=name)


def test_forgetting_is_the_mean_difference_over_domains() -> None:
    after = evaluation(domains={"a": loss([12, 24], [10, 10]), "b": loss([6, 9], [2, 1], "u")})
    change = forgetting(evaluation(), after)
    assert change.value == pytest.approx((0.3 + 0.0) / 2)
    assert change.low < change.value < change.high


def test_forgetting_of_the_same_model_is_0() -> None:
    change = forgetting(evaluation(), evaluation())
    assert (change.value, change.low, change.high) == (0, 0, 0)


def test_forgettings_interval_agrees_with_resampling_documents_of_all_domains_at_once() -> None:
    generator = np.random.default_rng(1)
    sizes = {name: generator.integers(50, 300, 80) for name in ("a", "b", "c")}
    first = {name: generator.normal(2, 0.5, 80) * sizes[name] for name in sizes}
    second = {name: first[name] + generator.normal(0.1, 0.05, 80) * sizes[name] for name in sizes}
    sides = [
        evaluation(domains={name: loss(bits.tolist(), sizes[name].tolist(), name) for name, bits in side.items()})
        for side in (first, second)
    ]
    change = forgetting(*sides)
    resampled = []
    for _ in range(2000):
        differences = []
        for name in sizes:
            drawn = generator.integers(0, 80, 80)
            differences.append((second[name] - first[name])[drawn].sum() / sizes[name][drawn].sum())
        resampled.append(np.mean(differences))
    low, high = np.percentile(resampled, [2.5, 97.5])
    # Two bootstraps of 1,000 and 2,000 resamples agree to some ten per cent of their width.
    assert change.low == pytest.approx(low, abs=0.15 * (high - low))
    assert change.high == pytest.approx(high, abs=0.15 * (high - low))


@pytest.mark.parametrize("domains", [{}, {"a": loss([1], [1])}, {"a": loss([1, 1], [10, 10], "other")}])
def test_forgetting_needs_the_same_text(domains: dict[str, DomainLoss]) -> None:
    with pytest.raises(ConfigError, match="did not measure the same general text"):
        forgetting(evaluation(), evaluation(domains=domains))
    with pytest.raises(ConfigError, match="did not measure the same general text"):
        forgetting(evaluation(domains={}), evaluation(domains={}))
