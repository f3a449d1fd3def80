"""What a comparison says, in plain sentences; what its intervals do not say is not said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metier.evaluation.comparison.results import Row
from metier.reports import units


def peak_bytes(row: Row) -> float | None:
    """Of the accelerator where there is one, else of the process."""
    device = row.costs["device_peak_bytes"]
    return row.costs["host_peak_bytes"] if device is None else device


def summary(rows: Sequence[Row]) -> list[str]:
    """Sentences on one task: who is ahead, who ties, what forgets least and costs least among those."""
    base = next(row for row in rows if row.is_base)
    trained = [row for row in rows if not row.is_base]
    if not trained:
        return ["Nothing is trained yet."]
    best = max(trained, key=lambda row: row.score.value)
    if best.score.value <= base.score.value:
        return [f"No method gained over the untouched base, which has {base.score.value:.1f}."]
    tied = [row for row in trained if row.is_tied_with_best]
    others = [row.label for row in tied if row is not best]
    ahead = f"{best.label} has the highest score, {best.score.value:.1f} (the untouched base {base.score.value:.1f})"
    if others:
        sentences = [f"{ahead}, but its lead over {_listed(others)} is within the noise."]
    else:
        sentences = [f"{ahead}, ahead of all others by more than the noise."]
    sentences += [
        _least(tied, "forgets least", lambda row: row.forgetting.value, lambda value: f"{value:+.3f} bits a byte"),
        _least(tied, "leaves the smallest delta", lambda row: row.costs["delta_bytes"], units.size),
        _least(tied, "takes the least memory", peak_bytes, units.size),
        _least(tied, "takes the shortest step", lambda row: row.costs["step_seconds"], units.duration),
    ]
    if base.is_tied_with_best:
        sentences.append("The untouched base itself is within the noise of the best: these data tell no method apart.")
    edges = [row.label for row in trained if row.is_at_edge]
    if edges:
        sentences.append(
            f"The best learning rate is at the edge of those tried, so that a better one may lie beyond, of "
            f"{_listed(edges)}."
        )
    few = sorted({row.num_seeds for row in trained})
    if few[0] < few[-1]:
        sentences.append("Not every method has run with all seeds yet.")
    return [sentence for sentence in sentences if sentence]


def _least(rows: Sequence[Row], what: str, value: Callable[[Row], float | None], write: Callable[[float], str]) -> str:
    known = [(cost, row.label) for row in rows if (cost := value(row)) is not None]
    if len(known) < 2:
        return ""
    cost, label = min(known)
    return f"Among those that are level with it, {label} {what}: {write(cost)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
