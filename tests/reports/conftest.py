"""A made-up run: two layers of five experts, a base and two methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from metier.evaluation.compare import MethodRun, compare
from metier.evaluation.metrics import score_replies
from metier.evaluation.result import ClozeScore, DomainLoss, Evaluation, SampleReply
from metier.reports.data import ReportData

REFERENCES = ["alpha beta", "gamma", "delta epsilon"]


def loss(bits_per_byte: float) -> DomainLoss:
    return DomainLoss(
        bits_per_byte=bits_per_byte,
        low=bits_per_byte - 0.1,
        high=bits_per_byte + 0.1,
        document_bits=(100 * bits_per_byte, 50 * bits_per_byte),
        document_bytes=(100, 50),
        num_tokens=40,
        fingerprint="text",
    )


def evaluation(replies: list[str], *, bits_per_byte: float, cloze: float) -> Evaluation:
    return Evaluation(
        task="greek",
        split="test",
        num_items=3,
        num_cut=1,
        fingerprint="items",
        metrics={name: score_replies(name, replies, REFERENCES) for name in ("chrf", "exact_match")},
        samples=tuple(
            SampleReply(prompt=f"prompt {i}", reference=reference, reply=reply, origin=f"test.jsonl:{i}")
            for i, (reference, reply) in enumerate(zip(REFERENCES, replies, strict=True))
        ),
        domains={"books": loss(bits_per_byte), "code": loss(bits_per_byte / 2)},
        cloze=ClozeScore(accuracy=cloze, low=cloze - 5, high=cloze + 5, chance=25.0, item_scores=(100.0, 0.0)),
        seconds={"task": 1.0},
        settings={"dtype": "float32"},
    )


@pytest.fixture
def run() -> ReportData:
    evaluations = {
        "base": evaluation(["a", "b", "c"], bits_per_byte=2.0, cloze=50),
        "esft": evaluation(["alpha beta", "gamma", ""], bits_per_byte=2.1, cloze=48),
        "full": evaluation(["alpha beta", "gamma", "delta epsilon"], bits_per_byte=2.4, cloze=40),
    }
    rows = compare(
        evaluations["base"],
        [
            MethodRun(
                name="esft",
                evaluation=evaluations["esft"],
                trainable_parameters=250_000,
                delta_bytes=500_000,
                train_seconds=30.0,
                peak_memory_bytes=10**9,
            ),
            MethodRun(name="full", evaluation=evaluations["full"], trainable_parameters=10**7),
        ],
    )
    return ReportData(
        title="ESFT on greek",
        model="tiny",
        task="greek",
        scores_LE=[[0.5, 0.1, 0.1, 0.2, 0.1], [0.05, 0.05, 0.1, 0.1, 0.7]],
        layer_ids=[1, 3],
        top_p=0.6,
        top_k=2,
        selected={1: [0, 3], 3: [4]},
        reliability=0.95,
        num_profiled_tokens=4096,
        metrics={
            "esft": [{"step": step, "loss": 3.0 - step / 50} for step in range(1, 41)],
            "full": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}],
        },
        evaluations=evaluations,
        rows=rows,
        total_parameters=10**7,
        model_bytes=2 * 10**7,
        config={"learning_rate": 0.001, "revision": None},
        versions={"metier": "0.1.0"},
        command="metier demo greek",
    )


@pytest.fixture
def changed(run: ReportData) -> Callable[..., ReportData]:
    """The run with some fields replaced."""

    def change(**fields: Any) -> ReportData:
        return dataclasses.replace(run, **fields)

    return change
