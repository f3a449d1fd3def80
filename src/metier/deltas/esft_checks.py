"""What can be wrong with an ESFT checkpoint, found by names and shapes before a tensor of it is read."""

from __future__ import annotations

import json
from pathlib import Path

from metier.deltas.esft_files import EXPERT_TENSOR, EXPERTS_FILE, CheckpointTensors
from metier.deltas.expert_matrices import matrix_shapes
from metier.deltas.tensors_file import DTYPES
from metier.errors import BaseMismatchError, CorruptDeltaError, SelectionError
from metier.models.fingerprint import fingerprint
from metier.models.load import LoadedModel
from metier.models.moe import MoELayer, moe_layers
from metier.routing.esft_format import read_expert_config

FINGERPRINT_KEY = "base_fingerprint"
"""In the metadata of the checkpoints that metier writes; ESFT's own do not say which base they are for."""
_OTHER_BASE = "Load the base that the checkpoint was trained on."


def named_experts(folder: Path, stored: CheckpointTensors) -> dict[int, tuple[int, ...]]:
    """What `expert_cfg.json` names, both layers and experts ascending.

    Raises:
        CorruptDeltaError: it is missing.
        SelectionError: it is not of ESFT's format, or wants what a delta does not hold.
    """
    path = folder / EXPERTS_FILE
    if not path.is_file():
        named = {str(layer): ids for layer, ids in stored.experts().items()}
        found = json.dumps({"experts": named, "shared_experts": False, "non_expert_modules": False})
        raise CorruptDeltaError(
            f"{path}: got no such file, expected the checkpoint's experts. ESFT's published training code does not "
            f"write it.\nWrite it, if these are the experts that were trained, as the files have them:\n{found}"
        )
    config = read_expert_config(path)
    for name in ("shared_experts", "non_expert_modules"):
        if getattr(config, name):
            raise SelectionError(
                f"{path}: {name}: got true, expected false: a delta of metier holds routed experts only, and leaving "
                f"the others out would not be the model that was trained.\nMerge this checkpoint with ESFT's own code."
            )
    experts = {layer: tuple(sorted(ids)) for layer, ids in sorted(config.experts.items()) if ids}
    for layer, ids in experts.items():
        twice = [expert for expert in set(ids) if ids.count(expert) > 1]
        if twice:
            raise SelectionError(f"{path}: layers.{layer}: got expert {min(twice)} twice. Name each once.")
    if not experts:
        raise SelectionError(f"{path}: experts: got none, expected at least one.\nThere is nothing to convert.")
    return experts


def check_on_base(
    folder: Path, stored: CheckpointTensors, experts: dict[int, tuple[int, ...]], base: LoadedModel
) -> None:
    """The checkpoint's experts and tensors are those of the base, by fingerprint, names, shapes and dtypes.

    Raises:
        BaseMismatchError, SelectionError, CorruptDeltaError: as `read_esft_checkpoint`.
    """
    layers = {layer.index: layer for layer in moe_layers(base.model)}
    _check_base(folder, stored, base)
    _check_experts(folder, experts, layers, base.source)
    _check_tensors(folder, stored, experts, layers)


def _check_base(folder: Path, stored: CheckpointTensors, base: LoadedModel) -> None:
    got, expected = fingerprint(base.model), stored.metadata.get(FINGERPRINT_KEY)
    if expected not in (None, got):
        raise BaseMismatchError(
            f"{folder}: the checkpoint was trained on a base with fingerprint {expected[:12]}…, but base "
            f"{base.source!r} has {got[:12]}….\n{_OTHER_BASE}"
        )


def _check_experts(
    folder: Path, experts: dict[int, tuple[int, ...]], layers: dict[int, MoELayer], base_name: str
) -> None:
    for index, ids in experts.items():
        if index not in layers:
            raise SelectionError(
                f"{folder / EXPERTS_FILE}: layers.{index}: base {base_name!r} has no MoE layer there; its MoE layers "
                f"are {sorted(layers)}.\nLayers count from 0, dense ones included. {_OTHER_BASE}"
            )
        num_experts = layers[index].num_experts
        beyond = [expert for expert in ids if not 0 <= expert < num_experts]
        if beyond:
            raise SelectionError(
                f"{folder / EXPERTS_FILE}: layers.{index}: got expert {beyond[0]}, but base {base_name!r} has "
                f"num_experts={num_experts}.\n{_OTHER_BASE}"
            )


def _check_tensors(
    folder: Path, stored: CheckpointTensors, experts: dict[int, tuple[int, ...]], layers: dict[int, MoELayer]
) -> None:
    """For each expert that is named, each of its matrices in the base's shape; no other; all of one dtype."""
    expected = {
        f"{layers[index].path}.{expert}.{matrix}": shape
        for index, ids in experts.items()
        for expert in ids
        for matrix, shape in matrix_shapes(layers[index]).items()
    }
    for name in sorted(stored.tensors.keys() - expected.keys()):
        raise CorruptDeltaError(f"{folder}: {_foreign(name, stored, experts, layers)}")
    for name, shape in expected.items():
        if name not in stored.tensors:
            raise CorruptDeltaError(
                f"{folder}: {EXPERTS_FILE} names the expert, but no file holds its {name}.\n"
                f"Copy the whole folder again; if the expert was not trained, leave it out of {EXPERTS_FILE}."
            )
        got = stored.tensors[name].shape
        if got != shape:
            raise CorruptDeltaError(
                f"{folder}: {name}: got shape {list(got)}, expected {list(shape)} by the base's experts.\n{_OTHER_BASE}"
            )
    dtypes = sorted({stored.tensors[name].dtype for name in expected})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        raise CorruptDeltaError(
            f"{folder}: got tensors of dtype {', '.join(dtypes)}, expected one of {', '.join(DTYPES)} for all.\n"
            "Save the checkpoint again in one dtype."
        )


def _foreign(
    name: str, stored: CheckpointTensors, experts: dict[int, tuple[int, ...]], layers: dict[int, MoELayer]
) -> str:
    """What is wrong with a tensor that no selected expert has."""
    found = EXPERT_TENSOR.fullmatch(name)
    if "shared_expert" in name or found is None:
        kind = "a shared expert's" if "shared_expert" in name else "no routed expert's"
        if any("embed" in other for other in stored.tensors):
            then = "These are the files of a whole model: load it with `metier.load`."
        else:
            then = "A delta of metier holds routed experts only. Merge this checkpoint with ESFT's own code."
        return f"{name} is {kind}, expected only those that {EXPERTS_FILE} names.\n{then}"
    layer, expert = int(found[1]), int(found[2])
    if expert not in experts.get(layer, ()):
        return (
            f"{name}: got a tensor of expert {expert} of layer {layer}, which {EXPERTS_FILE} does not name (it names "
            f"{list(experts.get(layer, ()))} there).\nOne of the two is another checkpoint's: copy both again."
        )
    return f"{name}: expected names such as {layers[layer].path}.{expert}.{next(iter(matrix_shapes(layers[layer])))}."
