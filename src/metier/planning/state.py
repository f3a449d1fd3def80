"""What a run trains and what it leaves alone, layer by layer, in parameters and bytes; printed before it starts.

A trained parameter costs its master, its gradient and AdamW's two moments; a frozen one its own bytes. Rows of a sparse
adapter have gradients for those that a step uses; here, as for the rest, stands what all of them take.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from rich.table import Table
from torch import Tensor, nn

from metier.catalogue.tree import method_of
from metier.memory.frozen_model import StoredSizes, frozen_weights
from metier.memory.frozen_weight import FrozenWeight
from metier.memory.row_state import state_bytes
from metier.methods.meft import MeftLayer
from metier.methods.sparse_delta import SparseDeltaLayer
from metier.methods.whole_module import COPIES
from metier.models.layers import layer_stacks
from metier.models.unwrap import bare_model, base_path, base_tensors
from metier.planning.optimizer_state import state_bytes_of
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
    gradient_bytes: int
    optimizer_bytes: int
    row_gradient_bytes: int = 0
    """Of the gradients, those of a sparse adapter's rows, whose room is kept from step to step."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Parameters and bytes of a run, known before it starts."""

    method: str
    rows: tuple[PlanRow, ...]
    base_bytes: int
    """Of the base's weights, those in a store included."""
    stored_bytes: int = 0
    """Of those weights that are in a store of their own."""
    stored_how: str = ""
    """Where and how, in words."""
    row_bytes: int = 0
    """Of the trained bytes, a sparse adapter's rows."""
    row_state_bytes: int = 0
    """Of AdamW's moments, those rows'."""
    kept_bytes: int = 0
    """Of what the method holds beside all parameters: positions, fixed projections, the entries that it replaced."""
    fixed_bytes: int = 0
    """Of the method's own parameters that are not trained."""

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
    def gradient_bytes(self) -> int:
        """At most; those of a sparse adapter's rows are in float32, whatever the rows are."""
        return sum(row.gradient_bytes for row in self.rows)

    @property
    def row_gradient_bytes(self) -> int:
        """Of the gradients, those of a sparse adapter's rows."""
        return sum(row.row_gradient_bytes for row in self.rows)

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments."""
        return sum(row.optimizer_bytes for row in self.rows)

    def __rich__(self) -> Table:
        share = self.num_trained / max(1, self.num_trained + self.num_frozen)
        table = Table(
            title=f"{self.method}: {self.num_trained:,} parameters are trained, {share:.1%} of what is loaded; "
            f"{megabytes(self.trained_bytes)} of masters, {megabytes(self.gradient_bytes)} of gradients"
            f"{' at most' if self.method == 'meft' else ''}, {megabytes(self.optimizer_bytes)} of "
            f"AdamW's moments, beside {megabytes(self.base_bytes)} of base"
            f"{f' ({megabytes(self.stored_bytes)} of it {self.stored_how})' if self.stored_bytes else ''}",
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

    def save(
        self,
        path: Path,
        foreseen: Mapping[str, float | str] | None = None,
        measured: Mapping[str, float | None] | None = None,
    ) -> None:
        """Write plan.json: what was known before the run, and beside it what was measured.

        Args:
            path: the file.
            foreseen: what else was predicted.
            measured: after the run, under the names of what was predicted where there is both.
        """
        predicted = {
            "num_trained_parameters": self.num_trained,
            "num_frozen_parameters": self.num_frozen,
            "base_bytes": self.base_bytes,
            "stored_base_bytes": self.stored_bytes,
            "trained_bytes": self.trained_bytes,
            "gradient_bytes": self.gradient_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            **(foreseen or {}),
        }
        content = {"method": self.method, "predicted": predicted, "measured": measured}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def training_plan(
    model: nn.Module,
    *,
    method: str,
    selection: ExpertSelection | None,
    row_state_dtype: str = "float32",
    stored: StoredSizes | None = None,
    options: Mapping[str, Any] | None = None,
) -> TrainingPlan:
    """Count what wants gradients and what does not, per decoder layer.

    Args:
        model: wrapped by the method.
        method: as in RunConfig.
        selection: of the methods that have one.
        row_state_dtype: what the optimizer keeps the moments of a sparse adapter's rows in.
        stored: of base weights that will be in a store, where the model is without weights and has none of them yet.
        options: of the method, those that the run sets.
    """
    num_layers = sum(len(stack) for stack in layer_stacks(model))
    counts: dict[str, _Counts] = {}
    base_bytes = row_bytes = row_state_bytes = fixed_bytes = 0
    for name, parameter, is_adapter in _parameters(model):
        row = counts.setdefault(_layer_of(name), _Counts())
        if parameter.requires_grad:
            if f".{COPIES}." in name:
                row.whole[bare_name(name)] = None
            gradient, moments = state_bytes_of(
                parameter, method, options or {}, in_layer=_layer_of(name) != "other", num_layers=num_layers
            )
            num_bytes = parameter.numel() * parameter.element_size()
            row.add(parameter.numel(), num_bytes, gradient_bytes=gradient, optimizer_bytes=moments)
        else:
            row.num_frozen += parameter.numel()
        if isinstance(parameter, FrozenWeight):
            base_bytes += parameter.store.num_bytes
        elif not is_adapter:
            base_bytes += parameter.numel() * parameter.element_size()
        elif not parameter.requires_grad:
            fixed_bytes += parameter.numel() * parameter.element_size()
    for layer in model.modules():
        for store in layer.stores.values() if isinstance(layer, MeftLayer) else ():
            row = counts[_layer_of(f".{layer.path}.")]
            row.what = f"{store.num_rows:,} rows in {store.num_blocks} Key-Experts ({store.tier}), and their router"
            num_numbers, moments = store.rows_NMWD.numel(), state_bytes(store, row_state_dtype)
            row_bytes += store.rows_NMWD.nbytes
            row_state_bytes += moments
            row.add(
                num_numbers,
                store.rows_NMWD.nbytes,
                gradient_bytes=4 * num_numbers,
                optimizer_bytes=moments,
            )
            row.row_gradient_bytes += 4 * num_numbers
    if selection is None and not method_of(method).saves_whole_model and method != "meft":
        for key, kinds in _adapted(model).items():
            counts[key].what = f"{method} on {', '.join(kinds)}"
    order = sorted(counts, key=lambda key: (key == "other", int(key) if key != "other" else 0))
    stores = [weight.store for weight in frozen_weights(model)]
    stored_bytes, where = sum(store.num_bytes for store in stores), stores[0].where if stores else ""
    if stored is not None:
        base_bytes += stored.stored_bytes - stored.plain_bytes
        stored_bytes, where = stored.stored_bytes, stored.where
    return TrainingPlan(
        method,
        tuple(counts[key].row(key, method, selection) for key in order),
        base_bytes,
        stored_bytes=stored_bytes,
        stored_how=where,
        row_bytes=row_bytes,
        row_state_bytes=row_state_bytes,
        kept_bytes=_kept_bytes(model),
        fixed_bytes=fixed_bytes,
    )


def saved_bytes(model: nn.Module, method: str, *, density: float) -> int | None:
    """Of an adapter as PEFT saves it; None where what is trained is what is saved, or PEFT cannot say it.

    Args:
        model: wrapped by the method; no weights are read.
        method: as in RunConfig.
        density: that diff pruning leaves.
    """
    if not isinstance(model, PeftModel) or method == "meft" or method_of(method).selects_experts:
        return None
    if method == "diff_pruning":  # a sparse delta of the largest differences is saved
        numbers: int = sum(p.numel() for name, p in model.named_parameters() if ".diff_pruning_values_" in name)
        return 8 * max(1, int(density * numbers + 0.5))
    try:
        saved: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception:  # some of PEFT's look at numbers, and there may be none
        return None
    return sum(tensor.numel() * tensor.element_size() for tensor in saved.values())


def _kept_bytes(model: nn.Module) -> int:
    held: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            beside = [child for name, child in module.named_children() if name != "base_layer"]
        elif isinstance(module, BaseTuner):
            beside = [child for name, child in module.named_children() if name != "model"]
        else:
            continue
        held |= {id(buffer): buffer for child in beside for buffer in child.buffers()}
    # the base's own entries, out of the way of a sparse delta's
    layers = [module for module in model.modules() if isinstance(module, SparseDeltaLayer)]
    replaced = sum(layer.replaced_bytes() for layer in layers)
    return replaced + sum(buffer.numel() * buffer.element_size() for buffer in held.values())


@dataclass(slots=True)
class _Counts:
    """What is counted of one layer."""

    num_trained: int = 0
    trained_bytes: int = 0
    num_frozen: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    row_gradient_bytes: int = 0
    whole: dict[str, None] = field(default_factory=dict)
    what: str = ""
    """What is trained, where the method says more than the counts."""

    def add(self, num_trained: int, trained_bytes: int, *, gradient_bytes: int, optimizer_bytes: int) -> None:
        self.num_trained += num_trained
        self.trained_bytes += trained_bytes
        self.gradient_bytes += gradient_bytes
        self.optimizer_bytes += optimizer_bytes

    def row(self, key: str, method: str, selection: ExpertSelection | None) -> PlanRow:
        what = self.what or _what(key, self.num_trained, method, selection, list(self.whole))
        return PlanRow(
            key,
            what,
            self.num_trained,
            self.trained_bytes,
            self.num_frozen,
            self.gradient_bytes,
            self.optimizer_bytes,
            self.row_gradient_bytes,
        )


def _layer_of(name: str) -> str:
    found = _LAYER.search(name)
    return found.group(1) if found else "other"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MB"


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter, and whether it is an adapter's."""
    of_base = {id(tensor) for _, tensor in base_tensors(bare_model(model))}
    for name, parameter in model.named_parameters():
        yield "." + base_path(name), parameter, id(parameter) not in of_base


def _adapted(model: nn.Module) -> dict[str, list[str]]:
    """What an adapter stands on, by layer: last names of modules, each once."""
    found: dict[str, dict[str, None]] = {}
    for path, module in bare_model(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            place = f".{base_path(path)}."
            found.setdefault(_layer_of(place), {})[base_path(path).rpartition(".")[2]] = None
    return {key: list(kinds) for key, kinds in found.items()}


def bare_name(parameter: str) -> str:
    """Which module of a layer a copy's parameter is of, such as `mlp.gate` or `self_attn`."""
    path = base_path(parameter.partition(f".{COPIES}.")[0])
    layer = _LAYER.search(f".{path}.")
    return path.rpartition(".")[2] if layer is None else f".{path}."[layer.end() :].strip(".")


def _what(key: str, num_trained: int, method: str, selection: ExpertSelection | None, whole: list[str]) -> str:
    if not num_trained:
        return "nothing"
    if method_of(method).saves_whole_model:
        return "everything"
    if selection is None:
        return f"{method}'s own"
    ids = selection.experts.get(int(key), ()) if key != "other" else ()
    if not ids:
        return f"whole {', '.join(whole)}"
    total = f" of {selection.num_experts}" if selection.num_experts else ""
    prefix = "LoRA on " if method == "expert_lora" else ""
    beside = f"; whole {', '.join(whole)}" if whole else ""
    return f"{prefix}{len(ids)}{total} experts: {', '.join(map(str, ids))}{beside}"
