"""What a run trains and what it leaves alone, layer by layer, in parameters and bytes; printed before it starts.

A trained parameter costs its master, its gradient and AdamW's two moments; a frozen one its own bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import nn

from metier.methods.whole_module import COPIES
from metier.models.unwrap import base_path
from metier.routing.selection import ExpertSelection

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One decoder layer, or everything outside the layers."""

    name: str
    what: str
    """What of it is trained, in words."""
    num_trained: int
    trained_bytes: int
    num_frozen: int


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Parameters and bytes of a run, known before it starts."""

    method: str
    rows: tuple[PlanRow, ...]
    base_bytes: int

    @property
    def num_trained(self) -> int:
        return sum(row.num_trained for row in self.rows)

    @property
    def num_frozen(self) -> int:
        return sum(row.num_frozen for row in self.rows)

    @property
    def trained_bytes(self) -> int:
        return sum(row.trained_bytes for row in self.rows)

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments, in the dtype of the masters."""
        return 2 * self.trained_bytes

    def __rich__(self) -> Table:
        share = self.num_trained / max(1, self.num_trained + self.num_frozen)
        table = Table(
            title=f"{self.method}: {self.num_trained:,} parameters are trained, {share:.1%} of what is loaded; "
            f"{megabytes(self.trained_bytes)} of masters, as much of gradients, {megabytes(self.optimizer_bytes)} of "
            f"AdamW's moments, beside {megabytes(self.base_bytes)} of base",
            title_justify="left",
        )
        for name in ("layer", "trained"):
            table.add_column(name)
        for name in ("parameters", "bytes", "frozen parameters"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                row.name, row.what, f"{row.num_trained:,}", megabytes(row.trained_bytes), f"{row.num_frozen:,}"
            )
        return table

    def save(self, path: Path, measured: dict[str, float] | None = None) -> None:
        """Write plan.json: what was known before the run, and beside it what was measured."""
        predicted = {
            "num_trained_parameters": self.num_trained,
            "num_frozen_parameters": self.num_frozen,
            "base_bytes": self.base_bytes,
            "trained_bytes": self.trained_bytes,
            "gradient_bytes": self.trained_bytes,
            "optimizer_bytes": self.optimizer_bytes,
        }
        content = {"method": self.method, "predicted": predicted, "measured": measured}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def training_plan(model: nn.Module, *, method: str, selection: ExpertSelection | None) -> TrainingPlan:
    """Count what wants gradients and what does not, per decoder layer."""
    whole: dict[str, dict[str, None]] = {}
    counts: dict[str, list[int]] = {}
    base_bytes = 0
    for name, parameter, is_adapter in _parameters(model):
        found = _LAYER.search(name)
        row = counts.setdefault(found.group(1) if found else "other", [0, 0, 0])
        if parameter.requires_grad:
            if f".{COPIES}." in name:
                module = bare_name(name)
                whole.setdefault(found.group(1) if found else "other", {})[module] = None
            row[0] += parameter.numel()
            row[1] += parameter.numel() * parameter.element_size()
        else:
            row[2] += parameter.numel()
        base_bytes += 0 if is_adapter else parameter.numel() * parameter.element_size()
    order = sorted(counts, key=lambda key: (key == "other", int(key) if key != "other" else 0))
    rows = tuple(
        PlanRow(key, _what(key, counts[key][0], method, selection, list(whole.get(key, {}))), *counts[key])
        for key in order
    )
    return TrainingPlan(method, rows, base_bytes)


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MB"


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    for name, parameter in model.named_parameters():
        bare = "." + base_path(name)
        yield bare, parameter, "esft_" in bare or "lora_" in bare or f".{COPIES}." in bare


def bare_name(parameter: str) -> str:
    """Which module of a layer a copy's parameter is of, such as `mlp.gate` or `self_attn`."""
    path = base_path(parameter.partition(f".{COPIES}.")[0])
    layer = _LAYER.search(f".{path}.")
    return path.rpartition(".")[2] if layer is None else f".{path}."[layer.end() :].strip(".")


def _what(key: str, num_trained: int, method: str, selection: ExpertSelection | None, whole: list[str]) -> str:
    if not num_trained:
        return "nothing"
    if method == "full":
        return "everything"
    if method == "lora":
        return "LoRA on all experts"
    assert selection is not None
    ids = selection.experts.get(int(key), ()) if key != "other" else ()
    if not ids:
        return f"whole {', '.join(whole)}"
    total = f" of {selection.num_experts}" if selection.num_experts else ""
    prefix = "LoRA on " if method == "expert_lora" else ""
    beside = f"; whole {', '.join(whole)}" if whole else ""
    return f"{prefix}{len(ids)}{total} experts: {', '.join(map(str, ids))}{beside}"
