"""The comparison's rows: gains, shares of the reference's gain, forgetting and cost."""

from __future__ import annotations

import pytest

from metier.errors import ConfigError
from metier.evaluation.compare import MethodRun, compare
from metier.evaluation.result import DomainLoss, Evaluation, MetricScore


def evaluation(score: float | None, bits: float | None = None, fingerprint: str = "f") -> Evaluation:
    metrics = (
        {}
        if score is None
        else {
            name: MetricScore(metric=name, value=value, low=value, high=value, item_scores=(value, value))
            for name, value in (("chrf", score), ("exact_match", score / 2))
        }
    )
    domains = (
        {}
        if bits is None
        else {
            "d": DomainLoss(
                bits_per_byte=bits,
                low=bits,
                high=bits,
                document_bits=(10 * bits, 20 * bits),
                document_bytes=(10, 20),
                num_tokens=9,
                fingerprint="d",
            )
        }
    )
    return Evaluation(
        task="t",
        split="test",
        num_items=2,
        num_cut=0,
        fingerprint=fingerprint,
        metrics=metrics,
        domains=domains,
    )


def test_rows_compare_gain_forgetting_and_cost() -> None:
    rows = compare(
        evaluation(20, 2.0),
        [
            MethodRun(
                name="esft",
                evaluation=evaluation(38, 2.1),
                trainable_parameters=7,
                delta_bytes=28,
                train_seconds=3.5,
                peak_memory_bytes=99,
            ),
            MethodRun(name="full", evaluation=evaluation(40, 2.3)),
        ],
    )
    assert [(row.name, row.is_base) for row in rows] == [("base", True), ("esft", False), ("full", False)]
    base, esft, full = rows
    assert base.score is not None
    assert base.score.value == 20
    assert (base.gain, base.gain_share, base.forgetting) == (None, None, None)
    assert esft.gain is not None
    assert esft.gain.value == pytest.approx(18)
    assert esft.gain_share == pytest.approx(0.9)
    assert full.gain_share == pytest.approx(1.0)
    assert esft.forgetting is not None
    assert esft.forgetting.value == pytest.approx(0.1)
    assert esft.bits_per_byte == 2.1
    assert (esft.trainable_parameters, esft.delta_bytes, esft.train_seconds, esft.peak_memory_bytes) == (
        7,
        28,
        3.5,
        99,
    )


def test_another_metric_can_lead() -> None:
    row = compare(evaluation(20), [MethodRun(name="esft", evaluation=evaluation(40))], metric="exact_match")[1]
    assert row.score is not None
    assert row.gain is not None
    assert (row.score.metric, row.gain.value) == ("exact_match", 10)


@pytest.mark.parametrize("full_score", [None, 20, 15])
def test_there_is_no_share_of_no_gain(full_score: float | None) -> None:
    runs = [MethodRun(name="esft", evaluation=evaluation(30))]
    if full_score is not None:
        runs.append(MethodRun(name="full", evaluation=evaluation(full_score)))
    assert compare(evaluation(20), runs)[1].gain_share is None


def test_what_was_not_evaluated_is_none() -> None:
    base, run = compare(evaluation(None, 2.0), [MethodRun(name="esft", evaluation=evaluation(None, 2.5))])
    assert (run.score, run.gain) == (None, None)
    assert run.forgetting is not None
    base, run = compare(evaluation(10), [MethodRun(name="esft", evaluation=evaluation(12))])
    assert (run.forgetting, base.bits_per_byte) == (None, None)


def test_two_runs_of_one_name_are_refused() -> None:
    runs = [MethodRun(name="esft", evaluation=evaluation(30))] * 2
    with pytest.raises(ConfigError, match="several runs named esft"):
        compare(evaluation(20), runs)


def test_runs_on_other_items_are_refused() -> None:
    with pytest.raises(ConfigError, match="different items"):
        compare(evaluation(20), [MethodRun(name="esft", evaluation=evaluation(30, fingerprint="other"))])
