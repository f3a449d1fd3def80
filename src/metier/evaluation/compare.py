"""The comparison that a run is judged by: methods side by side, in gain, forgetting and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metier.errors import ConfigError
from metier.evaluation.result import Change, ClozeScore, Evaluation, MetricScore, forgetting, gain


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRun:
    """One method's model, evaluated, and what it cost; costs that were not measured are None."""

    name: str
    evaluation: Evaluation
    trainable_parameters: int | None = None
    delta_bytes: int | None = None
    """What has to be stored beside the base."""
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonRow:
    """One line of the comparison. What was not evaluated or not measured is None."""

    name: str
    is_base: bool
    score: MetricScore | None
    gain: Change | None
    gain_share: float | None
    """This method's gain over the reference method's (full fine-tuning), 1.0 being as much."""
    bits_per_byte: float | None
    forgetting: Change | None
    cloze: ClozeScore | None
    trainable_parameters: int | None
    delta_bytes: int | None
    train_seconds: float | None
    peak_memory_bytes: int | None


def compare(
    base: Evaluation,
    runs: Sequence[MethodRun],
    *,
    reference: str | None = "full",
    metric: str | None = None,
    base_name: str = "base",
) -> list[ComparisonRow]:
    """Rows of the comparison: the base first, then the methods in the order given.

    Args:
        base: the evaluation of the untouched model.
        runs: one for each method, evaluated on the same items and text as the base.
        reference: the method whose gain is the whole; shares are None where it is not among the runs or its
            gain is not above 0, because a share of nothing says nothing.
        metric: which of the task's metrics; the first when not given.
        base_name: the base's name in its row.

    Raises:
        ConfigError: two runs of one name, or evaluations on different items or text.
    """
    names = [base_name, *(run.name for run in runs)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"compare: got several runs named {', '.join(twice)}, expected each name once.")
    gains = {run.name: gain(base, run.evaluation, metric=metric) for run in runs if base.metrics}
    whole = gains[reference].value if reference in gains else 0.0
    rows = [_row(MethodRun(name=base_name, evaluation=base), is_base=True, metric=metric)]
    for run in runs:
        change = gains.get(run.name)
        rows.append(
            _row(
                run,
                metric=metric,
                change=change,
                share=change.value / whole if change is not None and whole > 0 else None,
                lost=forgetting(base, run.evaluation) if base.domains else None,
            )
        )
    return rows


def _row(
    run: MethodRun,
    *,
    metric: str | None,
    is_base: bool = False,
    change: Change | None = None,
    share: float | None = None,
    lost: Change | None = None,
) -> ComparisonRow:
    evaluation = run.evaluation
    return ComparisonRow(
        name=run.name,
        is_base=is_base,
        score=evaluation.metrics.get(metric) if metric is not None else evaluation.score,
        gain=change,
        gain_share=share,
        bits_per_byte=evaluation.bits_per_byte,
        forgetting=lost,
        cloze=evaluation.cloze,
        trainable_parameters=run.trainable_parameters,
        delta_bytes=run.delta_bytes,
        train_seconds=run.train_seconds,
        peak_memory_bytes=run.peak_memory_bytes,
    )
