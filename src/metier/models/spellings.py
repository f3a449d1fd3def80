"""How configurations and modules of transformers spell what metier has one word for.

Every foreign name is translated here, once; the rest of metier says `top_k`, `num_shared_experts` and
`router`. The lists were read off the `configuration_*.py` and `modeling_*.py` of the families that follow the
experts contract.
"""

from __future__ import annotations

import re
from typing import Any

TOP_K = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
NUM_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")

ENCODER_LAYERS = ("encoder_layers", "num_layers")

ROUTER_NAMES = ("gate", "router")
SHARED_EXPERTS_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_GATE_NAMES = ("shared_expert_gate",)

LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|blocks|block|h)\.(\d+)(?=\.)")
"""The decoder layer's number inside a module path such as `model.layers.7.mlp.experts`."""

OTHER_MODALITY = re.compile(r"(?:^|\.)(?:vision|visual|image|audio|talker)(?=[._])")
"""A part of a multimodal model that no text passes, such as `model.vision_tower` or `mlp.vision_moe`."""

MOE_CLASS = re.compile(r"Expert|MoE$|Mo[eE](?:Block|Layer)$")
"""Class names that MoE blocks bear; only used to tell a foreign MoE layer from a dense model in an error."""


def first_count(owner: Any, names: tuple[str, ...], *, layer_index: int) -> int | None:
    """The first of `names` that `owner` has as a positive count, or None.

    Some families give one value a layer (a list); the entry of `layer_index` is taken from it.
    """
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, list | tuple) and layer_index < len(value):
            value = value[layer_index]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
