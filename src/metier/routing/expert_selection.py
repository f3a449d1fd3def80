"""A selection: which experts of which layers to train, checked against a model, kept in ESFT's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from metier.errors import SelectionError
from metier.models.moe import MoELayer
from metier.models.routed import routed_layers
from metier.routing.esft_format import ExpertConfig, read_expert_config, write_expert_config


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSelection:
    """Expert ids by decoder layer, and whether shared experts and everything else are trained too."""

    experts: dict[int, tuple[int, ...]]
    """Routed experts by decoder layer (counted from 0, dense layers included); where they come from a
    profile, by falling score. A layer that is not a key has no trained expert."""
    shared_experts: bool = False
    non_expert_modules: bool = False
    num_experts: int | None = field(default=None, compare=False)
    """Routed experts a layer of the model it was made for; None where that is unknown (ESFT's files do not
    say)."""

    def __post_init__(self) -> None:
        if not self.experts and not self.shared_experts and not self.non_expert_modules:
            raise SelectionError("the selection is empty: it names no expert and no other module.\nSelect something.")
        for layer, ids in self.experts.items():
            _check_ids(layer, ids)
            if self.num_experts is not None:
                _check_range(layer, ids, self.num_experts)

    @property
    def num_selected(self) -> int:
        """Routed experts selected, over all layers."""
        return sum(len(ids) for ids in self.experts.values())

    def save(self, path: str | Path) -> None:
        """Write ESFT's expert_config format; `num_experts` has no place in it."""
        config = ExpertConfig(
            experts=self.experts,
            shared_experts=self.shared_experts,
            non_expert_modules=self.non_expert_modules,
        )
        write_expert_config(Path(path), config)

    @classmethod
    def load(cls, path: str | Path) -> ExpertSelection:
        """Read ESFT's expert_config format.

        Raises:
            SelectionError: the file is missing, of another format, or selects nothing, an expert twice or a
                negative id.
        """
        config = read_expert_config(Path(path))
        try:
            return cls(
                experts=config.experts,
                shared_experts=config.shared_experts,
                non_expert_modules=config.non_expert_modules,
            )
        except SelectionError as error:
            raise SelectionError(f"{path}: {error}") from error

    def validate(self, model: nn.Module | Sequence[MoELayer]) -> None:
        """Check that everything selected exists.

        Args:
            model: the model, bare or wrapped, or its MoE layers.

        Raises:
            SelectionError: a layer without routed experts, an expert id past the last one, or shared experts
                of a model that has none.
            UnsupportedModelError: as `routed_layers`.
        """
        layers = {layer.index: layer for layer in (routed_layers(model) if isinstance(model, nn.Module) else model)}
        for layer, ids in self.experts.items():
            if layer not in layers:
                raise SelectionError(
                    f"layers.{layer}: the selection names experts {list(ids)}, but the model has no MoE "
                    f"layer there; its MoE layers are {_ranges(sorted(layers))}.\n"
                    f"The selection was made for another model; select again from this model's profile."
                )
            _check_range(layer, ids, layers[layer].num_experts)
        if self.shared_experts and not any(layer.num_shared_experts for layer in layers.values()):
            raise SelectionError(
                "shared_experts: got true, but the model has no shared expert in any layer.\nSet it to false."
            )


def _check_ids(layer: int, ids: tuple[int, ...]) -> None:
    if not ids:
        raise SelectionError(f"layers.{layer}: got no expert id, expected at least one; leave the layer out instead.")
    if min(ids) < 0:
        raise SelectionError(f"layers.{layer}: got expert {min(ids)}, expected ids from 0 on.")
    if len(set(ids)) < len(ids):
        twice = next(expert for expert in ids if ids.count(expert) > 1)
        raise SelectionError(f"layers.{layer}: got expert {twice} twice in {list(ids)}, expected each id once.")


def _check_range(layer: int, ids: tuple[int, ...], num_experts: int) -> None:
    if max(ids) >= num_experts:
        raise SelectionError(
            f"layers.{layer}: selection names expert {max(ids)}, but model has num_experts={num_experts} "
            f"(ids 0 to {num_experts - 1}).\n"
            f"The selection was made for another model; select again from this model's profile."
        )


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
