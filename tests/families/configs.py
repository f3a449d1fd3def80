"""A tiny configuration of any family, made from the family's own configuration class.

One table says what each name means in small; it is applied to every field of the class and of the classes inside it
(text, vision, audio), so a new family needs an entry of its own only where its fields depend on each other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tiny_models import VOCAB_SIZE

LAYER_KINDS = ("layer_types", "mlp_layer_types")
NUM_EXPERTS = 6
TOP_K = 2

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "moe_intermediate_size": 16,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    # latent attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "o_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # recurrent layers
    "linear_num_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    # vision and audio, which text never enters: as small as their classes allow
    "depth": 1,
    "image_size": 16,
    "patch_size": 4,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "d_ff": 32,
    "d_kv": 16,
    "out_hidden_size": 32,
    "output_dim": 32,
    "text_hidden_size": 32,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "projector_hidden_size": 32,
    "projection_hidden_dim": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "output_channels": 32,
    "mlp_dim": 32,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
}


_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dbrx": {
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0},  # read by the model, not a field of the class
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K},
    },
    "diffusion_gemma_text": {"global_head_dim": 16},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * 2},
    "doge": {"is_moe": True, "num_experts": 16},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
    },
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    # a third of a head is rotated, which has to be even; sliding layers have twice the key-value heads
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 32},
    "longcat_flash": {"num_layers": 1, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": 1},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "depths": [1] * 4},
    "muse_spark_text": {"moe_hidden_size": 16},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},  # in published configurations, not among the fields
    "step3p5": {"sliding_window": 32, "share_expert_dim": 16},
    "switch_transformers": {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,  # in published configurations, not among the fields
    },
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [8, 8]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a model small enough for a test, with four to eight experts in at least one layer."""
    return _shrunk(CONFIG_MAPPING[model_type])


def _shrunk(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = config_class()
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in names}
    values |= {
        name: _two_kinds(getattr(default, name)) for name in LAYER_KINDS if name in names and getattr(default, name)
    }
    for name in config_class.sub_configs:
        sub_config = getattr(default, name, None)
        if sub_config is not None:
            values[name] = _shrunk(type(sub_config))
    values |= OVERRIDES.get(config_class.model_type, {})
    return config_class(**values)


def _two_kinds(kinds: list[str]) -> list[str]:
    """Kinds of two layers, as unlike as the family has them: its first, and its last that is another."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[0], distinct[-1]]
