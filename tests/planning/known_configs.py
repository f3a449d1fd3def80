"""Configurations of well-known models, written out from their public hyperparameters: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import AutoConfig, PreTrainedConfig


def _model(model_type: str, **fields: object) -> Callable[[], PreTrainedConfig]:
    return partial(AutoConfig.for_model, model_type, **fields)


_LLAMA_7B = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}

KNOWN_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "LLaMA-7B": _model("llama", **_LLAMA_7B),
    "Llama-2-7B": _model("llama", **_LLAMA_7B),
    "Llama-3.1-405B": _model(
        "llama", vocab_size=128_256, hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126,
        num_attention_heads=128, num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "Qwen2.5-72B": _model(
        "qwen2", vocab_size=152_064, hidden_size=8192, intermediate_size=29_568, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "Mistral-7B-v0.1": _model(
        "mistral", vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, sliding_window=4096,
    ),
    "DeepSeek-67B": _model(
        "llama", vocab_size=102_400, hidden_size=8192, intermediate_size=22_016, num_hidden_layers=95,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "DeepSeek-V2-Lite": _model(
        "deepseek_v2", vocab_size=102_400, hidden_size=2048, intermediate_size=10_944, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64,
        num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=None, **_MLA,
    ),
    "DeepSeek-V2": _model(
        "deepseek_v2", vocab_size=102_400, hidden_size=5120, intermediate_size=12_288, moe_intermediate_size=1536,
        num_hidden_layers=60, num_attention_heads=128, num_key_value_heads=128, n_shared_experts=2,
        n_routed_experts=160, num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=1536, **_MLA,
    ),
    "DeepSeek-V3": _model(
        "deepseek_v3", vocab_size=129_280, hidden_size=7168, intermediate_size=18_432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1,
        n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3, q_lora_rank=1536, **_MLA,
    ),
    "Mixtral-8x7B": _model(
        "mixtral", vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=None, tie_word_embeddings=False,
    ),
    "OLMoE-1B-7B": _model(
        "olmoe", vocab_size=50_304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
    "Qwen3-30B-A3B": _model(
        "qwen3_moe", vocab_size=151_936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
    "Qwen3-235B-A22B": _model(
        "qwen3_moe", vocab_size=151_936, hidden_size=4096, moe_intermediate_size=1536, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
    "gpt-oss-20b": _model(
        "gpt_oss", vocab_size=201_088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
        sliding_window=128, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""A maker of each, because a configuration can be changed by what uses it."""
