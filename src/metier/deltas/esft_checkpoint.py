"""Read and write the adapter checkpoints of ESFT's own code (github.com/deepseek-ai/ESFT).

Such a folder has `expert_cfg.json`, which names the trained experts, and one or more safetensors files with their
whole matrices, one tensor each: `model.layers.N.mlp.experts.M.{gate,up,down}_proj.weight`. Layers count from 0, dense
ones included. Nothing in it says which base it was trained on, so what can be checked is that names and shapes are
the base's; what `write_esft_checkpoint` wrote has the base's fingerprint in its metadata, and that is checked too.
"""

# k experts of a layer, D hidden_size, F moe_intermediate_size

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from metier.deltas.esft_checks import FINGERPRINT_KEY, check_on_base, named_experts
from metier.deltas.esft_files import EXPERTS_FILE, CheckpointTensors, read_headers
from metier.deltas.expert_matrices import matrix_shapes, split_rows, stack_rows
from metier.deltas.format import rows_name
from metier.deltas.on_base import check_experts, check_fingerprint, check_tensors
from metier.deltas.read import Delta, read_delta
from metier.deltas.tensors_file import StoredTensor, write_tensors
from metier.deltas.whole_folder import check_replaceable, written_whole
from metier.deltas.write import as_stored, check_delta_folder, new_config, write_delta
from metier.models.load import LoadedModel, load
from metier.models.moe import MoELayer, moe_layers
from metier.routing.esft_format import ExpertConfig, write_expert_config

WEIGHTS_FILE = "model.safetensors"


def read_esft_checkpoint(
    folder: str | Path, base: str | Path | LoadedModel, output: str | Path, *, trust_remote_code: bool = False
) -> Delta:
    """Turn an ESFT checkpoint into a delta of metier on `base`: the same values to the bit, in their own dtype.

    Everything is checked by names and shapes before a tensor is read, and the delta appears whole or not at all.

    Args:
        folder: with `expert_cfg.json` and safetensors files.
        base: a folder, a hub id, "embedded", or a model from `metier.load`. Its weights are not compared.
        output: the delta's folder: new, empty, or a former delta's.
        trust_remote_code: as `metier.load`.

    Returns:
        the delta in `output`. Its experts ascend, whatever their order in `expert_cfg.json`.

    Raises:
        CorruptDeltaError: a file is missing or damaged; a tensor is missing, foreign, or of another shape or dtype.
        SelectionError: `expert_cfg.json` is not of ESFT's format, names experts that the base does not have, or wants
            shared experts or other modules, which a delta does not hold.
        BaseMismatchError: the checkpoint says that it was trained on another base.
        DeltaError: a value is not finite.
        ConfigError: `output` holds other things.
        ModelError: the base cannot be loaded.
    """
    folder, output = Path(folder), Path(output)
    check_delta_folder(output)
    stored = read_headers(folder)
    experts = named_experts(folder, stored)
    loaded = base if isinstance(base, LoadedModel) else load(base, trust_remote_code=trust_remote_code)
    check_on_base(folder, stored, experts, loaded)
    layers = {layer.index: layer for layer in moe_layers(loaded.model)}
    rows: dict[str, Tensor] = {}
    for index, ids in experts.items():
        stacked = stack_rows(layers[index], _load(stored, layers[index], ids))
        rows |= {rows_name(layers[index].path, name): tensor for name, tensor in stacked.items()}
    write_delta(output, model=loaded.model, config=new_config(loaded.model, experts), rows=rows)
    return read_delta(output)


def write_esft_checkpoint(
    delta: str | Path, base: str | Path | LoadedModel, folder: str | Path, *, trust_remote_code: bool = False
) -> Path:
    """Write a delta as an ESFT checkpoint: the same values to the bit, in their own dtype.

    Args:
        delta: the adapter's folder.
        base: the one it was trained on, which knows where gate and up lie in a row; as in `read_esft_checkpoint`.
        folder: new, empty, or a former checkpoint's of one file, which is then replaced.
        trust_remote_code: as `metier.load`.

    Returns:
        `folder`. Families with biases have them as `….{gate,up,down}_proj.bias`, which ESFT itself has no need of.

    Raises:
        CorruptDeltaError, DeltaError: as `read_delta`; or the delta's tensors do not fit the base's.
        BaseMismatchError: the delta was trained on another base.
        SelectionError: the delta replaces an expert that the base does not have.
        ConfigError: `folder` holds other things.
        ModelError: the base cannot be loaded.
    """
    folder = Path(folder)
    check_replaceable(
        folder,
        known=frozenset({EXPERTS_FILE, WEIGHTS_FILE}),
        marker=EXPERTS_FILE,
        what="a former checkpoint",
    )
    files = read_delta(delta, whole_rows_for="an ESFT checkpoint")
    loaded = base if isinstance(base, LoadedModel) else load(base, trust_remote_code=trust_remote_code)
    check_fingerprint(files, loaded.model, loaded.source)
    check_experts(files, loaded.model, loaded.source)
    check_tensors(files, loaded.model)
    tensors: dict[str, tuple[StoredTensor, memoryview]] = {}
    layers = {layer.index: layer for layer in moe_layers(loaded.model)}
    for index, rows in files.load_rows().items():
        for matrix, stacked in split_rows(layers[index], rows).items():
            for row, expert in enumerate(files.config.experts[index]):
                tensors[f"{layers[index].path}.{expert}.{matrix}"] = as_stored(stacked[row])
    config = ExpertConfig(experts=files.config.experts, shared_experts=False, non_expert_modules=False)
    with written_whole(folder) as new:
        write_expert_config(new / EXPERTS_FILE, config)
        metadata = {"format": "pt", FINGERPRINT_KEY: str(files.config.base_fingerprint)}
        write_tensors(new / WEIGHTS_FILE, tensors, metadata)
    return folder


def _load(stored: CheckpointTensors, layer: MoELayer, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """By matrix, (k, …): the matrices of a layer's experts from their files."""
    matrices = {}
    for matrix in matrix_shapes(layer):
        tensors = []
        for expert in ids:
            name = f"{layer.path}.{expert}.{matrix}"
            with safe_open(stored.files[name], framework="pt") as file:
                tensors.append(file.get_tensor(name))
        matrices[matrix] = torch.stack(tensors)
    return matrices
