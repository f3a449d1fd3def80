"""What an evaluation found, as plain values: scores with intervals, samples, and how two evaluations differ.

It imports no torch, so that a report can be made from `evaluation.json` files alone. Per-item scores and
per-document losses are kept: a difference between two models on the same items is far better known than
either score, and only paired values show that.
"""

# B resamples, N items or documents

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from metier.errors import ConfigError, DataError
from metier.evaluation.bootstrap import NUM_RESAMPLES, bootstrap_interval, mean_interval

FORMAT = 1
_Plain = TypeVar("_Plain")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricScore:
    """One metric over a task's items, 0 to 100, with its 95% interval."""

    metric: str
    value: float
    low: float
    high: float
    item_scores: tuple[float, ...]
    num_unparsed: int = 0
    """Replies that could not be read at all; they score 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleReply:
    """One test item as the model saw it, what was expected and what it said."""

    prompt: str
    reference: str
    reply: str
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainLoss:
    """Held-out loss on one domain of general text, with its 95% interval over documents."""

    bits_per_byte: float
    """Bits per UTF-8 byte of the text."""
    low: float
    high: float
    document_bits: tuple[float, ...]
    document_bytes: tuple[int, ...]
    num_tokens: int
    fingerprint: str
    """Hash of the text that was measured: only losses on the same text are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClozeScore:
    """Share (0 to 100) of cloze items whose right option the model finds likeliest, with its 95% interval."""

    accuracy: float
    low: float
    high: float
    chance: float
    item_scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A difference between two evaluations on the same items, with its paired 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Everything that one call of `evaluate` found."""

    task: str | None
    split: str | None
    num_items: int
    num_cut: int
    """Replies that reached max_new_tokens before the model ended them."""
    fingerprint: str
    """Hash of the items' prompts and references; empty without a task."""
    metrics: dict[str, MetricScore] = field(default_factory=dict)
    samples: tuple[SampleReply, ...] = ()
    domains: dict[str, DomainLoss] = field(default_factory=dict)
    cloze: ClozeScore | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> MetricScore | None:
        """The task's first metric: the one that comparisons and reports lead with."""
        return next(iter(self.metrics.values()), None)

    @property
    def bits_per_byte(self) -> float | None:
        """Mean over domains, each domain counting once however long it is; None where none was measured."""
        if not self.domains:
            return None
        return float(np.mean([loss.bits_per_byte for loss in self.domains.values()]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "evaluation") -> Evaluation:
        """The inverse of `to_dict`.

        Raises:
            DataError: the format is another one, or a key is missing or unknown.
        """
        values = dict(values)
        found = values.pop("format", None)
        if found != FORMAT:
            raise DataError(f"{where}: got format {found!r}, expected {FORMAT}. Evaluate again with this metier.")
        try:
            for key, cls_of_value in (("metrics", MetricScore), ("domains", DomainLoss)):
                values[key] = {name: _plain(cls_of_value, item) for name, item in values[key].items()}
            values["samples"] = tuple(_plain(SampleReply, item) for item in values["samples"])
            values["cloze"] = None if values["cloze"] is None else _plain(ClozeScore, values["cloze"])
            return _plain(cls, values)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: not a complete evaluation ({error}). Evaluate again.") from error

    def save(self, path: str | Path) -> None:
        """Write `evaluation.json`; the folder is made if it is missing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, is not JSON or is not an evaluation.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: cannot be read as an evaluation ({error}). Evaluate again.") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}: got a JSON {type(values).__name__}, expected an evaluation's object.")
        return cls.from_dict(values, where=str(path))


def _plain(cls: type[_Plain], values: Mapping[str, Any]) -> _Plain:
    """Build a dataclass from its dict, lists as tuples; a missing or unknown key is a named TypeError."""
    allowed = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    missing = sorted(allowed - set(values))
    if missing:
        raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}")
    return cls(**{key: tuple(item) if isinstance(item, list) else item for key, item in values.items()})


def gain(
    before: Evaluation, after: Evaluation, *, metric: str | None = None, num_resamples: int = NUM_RESAMPLES
) -> Change:
    """How much better `after` is at the task than `before`, in points of 0 to 100.

    The interval is that of the mean of per-item differences (the same items drawn for both), moved so that
    its centre is the difference of the scores; for metrics that are means of items the two centres are the
    same.

    Args:
        metric: which one; the task's first when not given.

    Raises:
        ConfigError: the two did not answer the same items, or lack the metric.
    """
    name = metric or next(iter(before.metrics), None)
    if name is None or name not in before.metrics or name not in after.metrics:
        raise ConfigError(
            f"gain: metric {name!r} is not in both evaluations: "
            f"got {sorted(before.metrics)} and {sorted(after.metrics)}. Evaluate both on the same task."
        )
    if before.fingerprint != after.fingerprint:
        raise ConfigError(
            f"gain: the evaluations answered different items ({before.task}/{before.split}, "
            f"{before.num_items} items, and {after.task}/{after.split}, {after.num_items} items). "
            "Use the same task, split and limit for both."
        )
    first, second = before.metrics[name], after.metrics[name]
    differences = np.asarray(second.item_scores) - np.asarray(first.item_scores)
    low, high = mean_interval(differences.tolist(), seed=0, num_resamples=num_resamples)
    value = second.value - first.value
    shift = value - float(differences.mean())
    return Change(value=value, low=low + shift, high=high + shift)


def forgetting(before: Evaluation, after: Evaluation, *, num_resamples: int = NUM_RESAMPLES) -> Change:
    """How much general ability was lost: bits per byte of `after` minus `before`, mean over domains.

    Above 0 means that the model predicts general text worse than before. Documents are resampled within each
    domain, the same ones for both models.

    Raises:
        ConfigError: the two were not measured on the same text.
    """
    texts = [{name: loss.fingerprint for name, loss in side.domains.items()} for side in (before, after)]
    if not texts[0] or texts[0] != texts[1]:
        different = sorted(name for name, _ in texts[0].items() ^ texts[1].items())
        raise ConfigError(
            f"forgetting: the evaluations did not measure the same general text: got domains "
            f"{sorted(texts[0])} and {sorted(texts[1])}, differing in {different}. "
            "Evaluate both with general=True and equal general_bytes."
        )
    value = 0.0
    spreads = []
    for position, name in enumerate(before.domains):
        first, second = before.domains[name], after.domains[name]
        difference = second.bits_per_byte - first.bits_per_byte
        value += difference / len(before.domains)
        low, high = _paired_ratio_interval(first, second, seed=position, num_resamples=num_resamples)
        spreads.append((difference - low, high - difference))
    # Domains are independent samples, so the half-widths of their mean add in squares.
    below, above = np.sqrt((np.asarray(spreads) ** 2).sum(axis=0)) / len(spreads)
    return Change(value=value, low=value - float(below), high=value + float(above))


def _paired_ratio_interval(
    first: DomainLoss, second: DomainLoss, *, seed: int, num_resamples: int
) -> tuple[float, float]:
    bits_N = np.asarray(second.document_bits) - np.asarray(first.document_bits)
    bytes_N = np.asarray(first.document_bytes, dtype=np.float64)
    return bootstrap_interval(
        lambda counts_BN: (counts_BN @ bits_N) / (counts_BN @ bytes_N),
        num_items=len(bits_N),
        seed=seed,
        num_resamples=num_resamples,
    )
