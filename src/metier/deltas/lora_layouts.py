"""The tensors of a LoRA on experts in the two layouts that other tools read.

`parameters` is PEFT's own for stacked experts (`target_parameters`): two pairs of matrices a layer, which hold all
experts. `per-expert` has a pair for each published matrix of each expert, `….experts.7.gate_proj.lora_A.weight`; vLLM
reads it for families that publish single experts, and wants all experts of a layer once it finds one. In both, experts
that a delta does not change are zeros.
"""

# C changed experts, R highest rank of an expert, I, O inputs and outputs of a projection

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from metier.deltas.format import NAME_PREFIX
from metier.deltas.published_layout import published_matrices
from metier.deltas.read import Delta
from metier.errors import DeltaError
from metier.methods.expert_lora.peft_layout import Factors, pack_layer, stacked_weights
from metier.models.moe import MoELayer


def highest_rank(files: Delta) -> int:
    """Of any changed expert."""
    settings = files.config.low_rank
    assert settings is not None, "read_delta reads the settings of a low-rank delta"
    return max(settings.rank(layer, expert) for layer, ids in files.config.experts.items() for expert in ids)


def _factors(files: Delta, layer: MoELayer, rows: dict[str, Tensor]) -> dict[str, Factors]:
    """`A` and `scale * B` of the changed experts, by the base's stacked weight.

    In the delta's dtype where it holds the scaled values as they are, which it does for a scale of 2; else in float32.
    """
    settings = files.config.low_rank
    assert settings is not None, "read_delta reads the settings of a low-rank delta"
    scales = [settings.scale(layer.index, expert) for expert in files.config.experts[layer.index]]
    factors = {}
    for name in stacked_weights(layer):
        side = "down" if name == "down_proj" else "up"
        a_CRI, b_COR = rows[f"{side}_A"], rows[f"{side}_B"]
        scaled_COR = b_COR.float() * torch.tensor(scales).view(-1, 1, 1)
        is_exact = torch.equal(scaled_COR.to(b_COR.dtype).float(), scaled_COR)
        factors[name] = (a_CRI, scaled_COR.to(b_COR.dtype) if is_exact else scaled_COR)
    return factors


def stacked_layout(files: Delta, layers: list[MoELayer], rank: int) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors in PEFT's layout, and the parameters that they change."""
    rows, tensors = files.load_rows(), dict[str, Tensor]()
    for layer in layers:
        ids = files.config.experts[layer.index]
        tensors |= pack_layer(layer, ids, _factors(files, layer, rows[layer.index]), rank)
    return tensors, [f"{layer.path}.{name}" for layer in layers for name in stacked_weights(layer)]


def per_expert_layout(
    files: Delta, model: PreTrainedModel, layers: list[MoELayer], rank: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the published names of single experts' matrices, and how those names end, for all experts."""
    rows, tensors, ends = files.load_rows(), dict[str, Tensor](), set[str]()
    for layer in layers:
        places = {expert: place for place, expert in enumerate(files.config.experts[layer.index])}
        for weight, (a_CRI, b_COR) in _factors(files, layer, rows[layer.index]).items():
            matrices = published_matrices(model, layer, weight)
            if matrices is None:
                raise DeltaError(
                    f"{layer.path}.{weight}: {model.config.model_type} publishes its experts stacked, so there are no "
                    "names of single experts for a LoRA.\nExport it with `--layout parameters`."
                )
            for matrix in matrices:
                a_RI = a_CRI.new_zeros(rank, a_CRI.shape[2])
                b_OR = b_COR.new_zeros(len(range(*matrix.rows.indices(b_COR.shape[1]))), rank)
                place = places.get(matrix.expert)
                if place is not None:
                    a_RI[: a_CRI.shape[1]], b_OR[:, : b_COR.shape[2]] = a_CRI[place], b_COR[place, matrix.rows]
                path = matrix.name.removesuffix(".weight")
                tensors[f"{NAME_PREFIX}{path}.lora_A.weight"] = a_RI
                tensors[f"{NAME_PREFIX}{path}.lora_B.weight"] = b_OR
                ends.add(path[path.index("experts.") :])
    # with the expert's number: shared experts have projections of the same names
    return tensors, sorted(ends)
