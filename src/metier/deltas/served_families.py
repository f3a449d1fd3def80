"""The families whose loaders in vLLM and SGLang were read: which expert tensors those look for in a checkpoint.

Read, not run: neither server can be installed without a GPU. In vLLM these are
`vllm/model_executor/models/{deepseek_v2,gpt_oss,mixtral,olmoe,qwen3_moe}.py` (`get_expert_mapping`, `load_weights`, and
`hf_to_vllm_mapper` of GPT-OSS), in SGLang `python/sglang/srt/models/` of the same names. Of a family that is not here
nothing is known; its checkpoints have the layout of their base all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LoraLayout = Literal["parameters", "per-expert"]

_GATE_UP_DOWN = {
    "mlp.experts.{expert}.gate_proj.weight": "FD",
    "mlp.experts.{expert}.up_proj.weight": "FD",
    "mlp.experts.{expert}.down_proj.weight": "DF",
}
_MIXTRAL = {
    "block_sparse_moe.experts.{expert}.w1.weight": "FD",
    "block_sparse_moe.experts.{expert}.w2.weight": "DF",
    "block_sparse_moe.experts.{expert}.w3.weight": "FD",
}
_GPT_OSS = {
    "mlp.experts.gate_up_proj": "EDU",
    "mlp.experts.gate_up_proj_bias": "EU",
    "mlp.experts.down_proj": "EFD",
    "mlp.experts.down_proj_bias": "ED",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedFamily:
    """What the loaders of both servers read of one family."""

    architecture: str
    """In `architectures` of config.json, by which a server chooses the loader."""
    experts: Mapping[str, str]
    """By a tensor's name in a decoder layer, its shape: E experts, D hidden_size, F moe_intermediate_size, U = 2F."""
    lora_layout: LoraLayout
    """The layout in which vLLM reads a LoRA on these experts."""


SERVED: Mapping[str, ServedFamily] = {
    "deepseek_v2": ServedFamily(architecture="DeepseekV2ForCausalLM", experts=_GATE_UP_DOWN, lora_layout="per-expert"),
    "deepseek_v3": ServedFamily(architecture="DeepseekV3ForCausalLM", experts=_GATE_UP_DOWN, lora_layout="per-expert"),
    "gpt_oss": ServedFamily(architecture="GptOssForCausalLM", experts=_GPT_OSS, lora_layout="parameters"),
    "mixtral": ServedFamily(architecture="MixtralForCausalLM", experts=_MIXTRAL, lora_layout="per-expert"),
    "olmoe": ServedFamily(architecture="OlmoeForCausalLM", experts=_GATE_UP_DOWN, lora_layout="per-expert"),
    "qwen3_moe": ServedFamily(architecture="Qwen3MoeForCausalLM", experts=_GATE_UP_DOWN, lora_layout="per-expert"),
}
"""By `model_type`."""


def expert_shapes(
    family: ServedFamily, layer: int, *, num_experts: int, hidden_size: int, moe_intermediate_size: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the expert tensors that the loaders look for in one decoder layer."""
    sizes = {"E": num_experts, "D": hidden_size, "F": moe_intermediate_size, "U": 2 * moe_intermediate_size}
    shapes = {}
    for pattern, axes in family.experts.items():
        experts = range(num_experts) if "{expert}" in pattern else (0,)
        for expert in experts:
            name = f"model.layers.{layer}.{pattern.format(expert=expert)}"
            shapes[name] = tuple(sizes[axis] for axis in axes)
    return shapes
