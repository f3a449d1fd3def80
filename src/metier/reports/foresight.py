"""What a run foresaw of itself, beside what it took."""

from __future__ import annotations

from collections.abc import Callable

from metier.reports import units
from metier.reports.blocks import missing, section, table
from metier.reports.data import ReportData, method_title
from metier.reports.markup import Child, Markup, join

_ROWS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("peak_memory_bytes", "peak memory", units.size),
    ("step_seconds", "a step", units.duration),
    ("train_seconds", "all steps", units.duration),
)


def foresight(data: ReportData) -> Markup:
    """Predicted and measured memory and time of every method; nothing for a report without a run."""
    if not data.plans:
        return join(())
    body: list[list[Child]] = []
    for name, plan in data.plans.items():
        predicted, measured = plan.get("predicted") or {}, plan.get("measured") or {}
        for key, title, write in _ROWS:
            expected, found = predicted.get(key), measured.get(key)
            if expected is None or not found:
                continue
            error = units.signed(100 * (expected / found - 1), digits=1)
            body.append([f"{method_title(name)}: {title}", write(expected), write(found), f"{error}%"])
    if not body:
        return section("Foreseen", missing("Nothing of this run was foreseen; its plan.json says why."))
    bottlenecks = {
        method_title(name): plan["predicted"]["bottleneck"]
        for name, plan in data.plans.items()
        if "bottleneck" in (plan.get("predicted") or {})
    }
    return section(
        "Foreseen",
        table(["", "foreseen", "measured", "error"], body),
        lead="Predicted before the first step. "
        + " ".join(f"{name} spends most of a step on {part}." for name, part in bottlenecks.items()),
    )
