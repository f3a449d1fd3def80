"""Several deltas of one base made into one: their union where they do not collide, a weighted sum where they do.

A delta replaces whole experts, so what is added up is the change of each, `row - base`, as task arithmetic has it
(arXiv:2212.04089): the composed expert is `base + sum of weight * change`. A single delta with a negative weight is its
negation, which moves the model away from the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metier.deltas.format import rows_name
from metier.deltas.on_base import check_experts, check_fingerprint, check_tensors
from metier.deltas.read import Delta, read_delta
from metier.deltas.write import check_delta_folder, new_config, write_delta
from metier.errors import ConfigError
from metier.models.load import LoadedModel, load
from metier.models.moe import MoELayer, moe_layers

Changes = dict[tuple[int, int], Tensor]
"""By (layer, expert): `row - base` of all its matrices and biases, float32, flattened to one row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflict:
    """An expert that two deltas both change."""

    layer: int
    expert: int
    first: str
    second: str
    cosine: float
    """Of the two changes: 1 where they pull the same way, -1 where they undo each other."""
    norm_ratio: float
    """The larger change's norm by the smaller's; infinite where one is zero."""


def compose(
    deltas: Mapping[str, str | Path] | Sequence[str | Path],
    base: str | Path | LoadedModel,
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Delta:
    """Write one delta that does what several do.

    Args:
        deltas: adapters' folders, all of `base`; a mapping gives them names for errors.
        base: a folder, a hub id, "embedded", or a model from `metier.load`.
        output: new, empty, or a former delta's folder.
        weights: one a delta, any finite number but 0. By default an expert that one delta changes is taken over as it
            is, to the bit where the dtypes are the same, and one that several change gets the mean of their changes.
        dtype: of the rows to store; None takes the base's.
        trust_remote_code: as `metier.load`.

    Returns:
        the delta in `output`.

    Raises:
        ConfigError: no deltas, weights that are not one finite number other than 0 for each, or `output` holds other
            things.
        BaseMismatchError, SelectionError, CorruptDeltaError: a delta is not of this base, or damaged.
        DeltaError: a composed value is not finite.
    """
    named = _named(deltas)
    _check_weights(weights, len(named))
    check_delta_folder(Path(output))
    loaded = base if isinstance(base, LoadedModel) else load(base, trust_remote_code=trust_remote_code)
    read = [_read(folder, loaded) for folder in named.values()]
    rows: dict[str, Tensor] = {}
    experts: dict[int, list[int]] = {}
    all_rows = [delta.load_rows() for delta in read]
    for layer in moe_layers(loaded.model):
        owners = _owners(read, layer.index)
        if not owners:
            continue
        experts[layer.index] = sorted(owners)
        for name in layer.parameter_names():
            base_E = getattr(layer.experts, name).detach()
            parts = [tensors.get(layer.index, {}).get(name) for tensors in all_rows]
            composed = [_row(base_E[expert], parts, owners[expert], weights) for expert in experts[layer.index]]
            rows[rows_name(layer.path, name)] = torch.stack(composed).to(dtype or base_E.dtype)
    write_delta(Path(output), model=loaded.model, config=new_config(loaded.model, experts), rows=rows)
    return read_delta(output)


def conflicts(
    deltas: Mapping[str, str | Path] | Sequence[str | Path],
    base: str | Path | LoadedModel,
    *,
    trust_remote_code: bool = False,
) -> list[Conflict]:
    """The experts that two of the deltas both change, by layer, expert and pair of deltas.

    Raises:
        BaseMismatchError, SelectionError, CorruptDeltaError: a delta is not of this base, or damaged.
    """
    loaded = base if isinstance(base, LoadedModel) else load(base, trust_remote_code=trust_remote_code)
    changes = {name: _changes(_read(folder, loaded), loaded) for name, folder in _named(deltas).items()}
    names = list(changes)
    found = []
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            for place in sorted(changes[first].keys() & changes[second].keys()):
                one, other = changes[first][place], changes[second][place]
                norms = sorted((float(one.norm()), float(other.norm())))
                found.append(
                    Conflict(
                        layer=place[0],
                        expert=place[1],
                        first=first,
                        second=second,
                        cosine=float(torch.nn.functional.cosine_similarity(one, other, dim=0)),
                        norm_ratio=norms[1] / norms[0] if norms[0] else float("inf"),
                    )
                )
    return sorted(found, key=lambda conflict: (conflict.layer, conflict.expert))


def _named(deltas: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Path]:
    named = deltas if isinstance(deltas, Mapping) else {str(folder): folder for folder in deltas}
    if not named or len(named) != len(deltas):
        raise ConfigError(f"compose: got deltas {list(map(str, deltas))}, expected at least one, and each once.")
    return {name: Path(folder) for name, folder in named.items()}


def _check_weights(weights: Sequence[float] | None, num_deltas: int) -> None:
    if weights is None:
        return
    if len(weights) != num_deltas or not all(abs(weight) < float("inf") and weight for weight in weights):
        raise ConfigError(
            f"compose: got weights {list(weights)} for {num_deltas} deltas, expected one finite number other than 0 "
            "for each. Leave a delta out instead of giving it 0."
        )


def _read(folder: Path, base: LoadedModel) -> Delta:
    delta = read_delta(folder, whole_rows_for="composition")
    check_fingerprint(delta, base.model, base.source)
    check_experts(delta, base.model, base.source)
    check_tensors(delta, base.model)
    return delta


def _owners(deltas: Sequence[Delta], layer: int) -> dict[int, list[tuple[int, int]]]:
    """By expert: (number of the delta, row in it) of each delta that changes it."""
    owners: dict[int, list[tuple[int, int]]] = {}
    for number, delta in enumerate(deltas):
        for row, expert in enumerate(delta.config.experts.get(layer, ())):
            owners.setdefault(expert, []).append((number, row))
    return owners


def _row(
    base: Tensor, parts: Sequence[Tensor | None], owners: Sequence[tuple[int, int]], weights: Sequence[float] | None
) -> Tensor:
    """One composed row; in float32, but for a row that is taken over as it is."""
    found = []
    for number, row in owners:
        rows = parts[number]
        assert rows is not None, "check_tensors saw every parameter of every layer that a delta names"
        found.append((rows[row], 1 / len(owners) if weights is None else weights[number]))
    if len(found) == 1 and found[0][1] == 1:
        return found[0][0].float()
    base = base.float()
    changes = [weight * (row.float() - base) for row, weight in found]
    return base + torch.stack(changes).sum(0)


def _changes(delta: Delta, base: LoadedModel) -> Changes:
    layers: dict[int, MoELayer] = {layer.index: layer for layer in moe_layers(base.model)}
    rows, found = delta.load_rows(), {}
    for index, ids in delta.config.experts.items():
        for row, expert in enumerate(ids):
            parts = [
                (tensor[row].float() - getattr(layers[index].experts, name).detach()[expert].float()).flatten()
                for name, tensor in sorted(rows[index].items())
            ]
            found[index, expert] = torch.cat(parts)
    return found
