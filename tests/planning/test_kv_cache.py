"""What the cache takes, against the tensors of real ones after a real forward pass, and against published figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from metier.errors import UnsupportedModelError
from metier.planning.kv_cache import KvCache, LayerCache, kv_cache
from planning.known_configs import KNOWN_CONFIGS
from tiny_models import FAMILIES, tiny_model

WINDOW = 8
COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "num_hidden_layers": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 16}
DELTA_NET = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12,
}  # fmt: skip
SWA, WINDOWED = f"GQA, sliding window of {WINDOW}", {"sliding_window": WINDOW, "head_dim": 16}
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "multi-head": ("llama", {"num_key_value_heads": 4}, ["MHA"] * 2),
    "grouped": ("llama", {}, ["GQA"] * 2),
    "multi-query": ("llama", {"num_key_value_heads": 1}, ["MQA"] * 2),
    "head_dim apart from hidden_size": ("qwen3", {"head_dim": 24}, ["GQA"] * 2),
    "falcon": ("falcon", {"multi_query": True}, ["MQA"] * 2),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, ["MHA"] * 2),
    "gpt_bigcode": ("gpt_bigcode", {}, ["MQA"] * 2),
    "mistral": ("mistral", {"sliding_window": WINDOW}, [SWA] * 2),
    "gemma2": ("gemma2", WINDOWED, [SWA, "GQA"]),
    "gemma3": ("gemma3_text", {**WINDOWED, "num_hidden_layers": 6}, [SWA] * 5 + ["GQA"]),
    "gemma4, layers that reuse others'": (
        "gemma4_text",
        {
            **WINDOWED, "num_hidden_layers": 12, "num_kv_shared_layers": 6, "global_head_dim": 32,
            "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
        },
        [SWA] * 5 + ["GQA"] + ["nothing"] * 6,
    ),
    "gpt_oss": ("gpt_oss", {**WINDOWED, **MOE}, [SWA, "GQA"]),
    "llama4, chunks": (
        "llama4_text",
        {"num_hidden_layers": 4, "head_dim": 16, "intermediate_size_mlp": 24, "attention_chunk_size": WINDOW, **MOE,
         "num_experts_per_tok": 1},
        [SWA] * 3 + ["GQA"],
    ),
    "deepseek_v2": ("deepseek_v2", {**MLA, **MOE, **SMALL_EXPERTS}, ["MLA"] * 2),
    "deepseek_v3": ("deepseek_v3", {**MLA, **MOE, **SMALL_EXPERTS, "first_k_dense_replace": 1}, ["MLA"] * 2),
    "minicpm3": ("minicpm3", MLA, ["MLA"] * 2),
    "longcat, two attentions a layer": (
        "longcat_flash",
        {**MLA, **MOE, "num_hidden_layers": 4, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16, "moe_topk": 2,
         "zero_expert_num": 1},
        ["MLA"] * 4,
    ),
    "nemotron_h": (
        "nemotron_h",
        {"layers_block_type": ["mamba", "attention", "moe", "mlp"], "head_dim": 16, "mamba_num_heads": 4,
         "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, **MOE, **SMALL_EXPERTS,
         "moe_shared_expert_intermediate_size": 16},
        ["state", "GQA", "nothing", "nothing"],
    ),
    "bamba": (
        "bamba", {**MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1]}, ["state", "GQA", "state"],
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**MAMBA2, **MOE, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
        ["state", "GQA"],
    ),
    "falcon_h1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 64, "head_dim": 16}, ["GQA + state"] * 2),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16}, ["state"] * 2),
    "jamba": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_dt_rank": 4},
        ["state", "GQA"],
    ),
    "qwen3_next": ("qwen3_next", {**DELTA_NET, **MOE, **SMALL_EXPERTS}, ["state"] * 3 + ["GQA"]),
    "qwen3_5": ("qwen3_5_text", DELTA_NET, ["state"] * 3 + ["GQA"]),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**DELTA_NET, **MOE, **SMALL_EXPERTS}, ["state"] * 3 + ["GQA"]),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, ["state", "GQA"]),
    "lfm2_moe": (
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention"], **MOE, **SMALL_EXPERTS, "num_dense_layers": 1},
        ["state", "GQA"],
    ),
}  # fmt: skip
"""Model type, sizes, and what each layer keeps, in words."""


def config_of(case: str, **changes: Any) -> PreTrainedConfig:
    kind, sizes, _ = CASES[case]
    return AutoConfig.for_model(kind, **{**COMMON, **sizes, **changes})


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens(num_sequences: int, num_tokens: int) -> Tensor:
    return torch.arange(3, 3 + num_sequences * num_tokens).view(num_sequences, num_tokens) % 100 + 3


@torch.no_grad()
def cache_after(model: torch.nn.Module, ids: Tensor, past: Any = None) -> Any:
    options = {} if past is None else {"past_key_values": past}
    out = model(input_ids=ids, use_cache=True, **options)
    return out.past_key_values if hasattr(out, "past_key_values") else out.cache_params


def kept_tensors(layer: Any) -> Iterator[Tensor]:
    """Keys, values, and the states that are in dictionaries; not the counters, which have no more than one dimension."""
    for value in vars(layer).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                yield tensor


def real_bytes(cache: Any) -> list[int]:
    return [sum(tensor.nbytes for tensor in kept_tensors(layer)) for layer in cache.layers]


def held_bytes(cache: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in kept_tensors(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_real_cache_has_the_bytes_that_were_predicted(case: str, dtype: torch.dtype) -> None:
    config = config_of(case)
    model, predicted = model_of(config, dtype), kv_cache(config, dtype=dtype)
    assert [str(layer) for layer in predicted.layers] == CASES[case][2]
    for num_tokens in (1, WINDOW - 1, WINDOW, 3 * WINDOW):
        cache = cache_after(model, tokens(2, num_tokens))
        assert real_bytes(cache) == [2 * layer.bytes_for(num_tokens) for layer in predicted.layers]
        assert sum(real_bytes(cache)) == predicted.bytes_for(num_tokens, 2)
        assert held_bytes(cache) == predicted.bytes_after_prompt(num_tokens, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_that_metier_is_tested_with_are_known(family: str) -> None:
    model = tiny_model(family).eval()
    predicted = kv_cache(model.config, dtype=torch.float32)
    cache = cache_after(model, tokens(3, 17))
    assert real_bytes(cache) == [3 * layer.bytes_for(17) for layer in predicted.layers]


@pytest.mark.parametrize("case", ["gemma2", "nemotron_h", "deepseek_v3"])
def test_a_cache_that_grows_token_by_token_has_the_bytes_of_one_that_was_filled_at_once(case: str) -> None:
    config = config_of(case)
    model, predicted = model_of(config), kv_cache(config, dtype=torch.float32)
    past = cache_after(model, tokens(2, 3 * WINDOW))
    for num_tokens in range(3 * WINDOW + 1, 3 * WINDOW + 4):
        past = cache_after(model, tokens(2, 1), past)
        assert sum(real_bytes(past)) == predicted.bytes_for(num_tokens, 2)
    step = predicted.bytes_for(3 * WINDOW + 1) - predicted.bytes_for(3 * WINDOW)
    assert step == predicted.long_token_bytes


def test_a_window_holds_the_whole_prompt_until_the_next_token_comes() -> None:
    config = config_of("mistral")
    model, predicted = model_of(config), kv_cache(config, dtype=torch.float32)
    past = cache_after(model, tokens(1, 100))
    assert sum(real_bytes(past)) == predicted.bytes_for(100) == (WINDOW - 1) * predicted.token_bytes
    assert held_bytes(past) == predicted.bytes_after_prompt(100) == 100 * predicted.token_bytes
    past = cache_after(model, tokens(1, 1), past)
    assert held_bytes(past) == WINDOW * predicted.token_bytes


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v3"])
def test_expanded_mla_has_the_bytes_of_the_heads_that_attention_sees(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(case)
    model, seen = model_of(config), []
    for layer in model.model.layers:
        expand = layer.self_attn.expand_kv

        def noted(*args: Any, expand: Any = expand) -> Any:
            heads = expand(*args)
            seen.append(sum(tensor.nbytes for tensor in heads))
            return heads

        monkeypatch.setattr(layer.self_attn, "expand_kv", noted)
    cache_after(model, tokens(2, 5))
    expanded = kv_cache(config, dtype=torch.float32, mla="expanded")
    assert seen == [2 * layer.bytes_for(5) for layer in expanded.layers]


def with_virtual_tokens(case: str, method: Any, num_tokens: int) -> tuple[KvCache, int]:
    """What is predicted of a model, and the bytes that five virtual tokens add to the real cache of two sequences."""
    config = config_of(case)
    model = model_of(config)
    before = sum(real_bytes(cache_after(model, tokens(2, num_tokens))))
    tuned = peft.get_peft_model(model, method(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    after = sum(real_bytes(cache_after(tuned, tokens(2, num_tokens))))
    return kv_cache(config, dtype=torch.float32), after - before


@pytest.mark.parametrize("num_tokens", [2, 3 * WINDOW])
@pytest.mark.parametrize("case", ["grouped", "multi-query", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4, chunks"])
def test_prefixes_add_what_peft_puts_into_the_cache(case: str, num_tokens: int) -> None:
    predicted, added = with_virtual_tokens(case, peft.PrefixTuningConfig, num_tokens)
    assert added == predicted.prefix_bytes(5, num_tokens=num_tokens, num_sequences=2)


@pytest.mark.parametrize("num_tokens", [2, 3 * WINDOW])
@pytest.mark.parametrize("case", ["grouped", "mistral", "gemma2", "deepseek_v2", "nemotron_h", "qwen3_next"])
def test_soft_prompts_add_as_many_tokens_to_every_sequence(case: str, num_tokens: int) -> None:
    predicted, added = with_virtual_tokens(case, peft.PromptTuningConfig, num_tokens)
    assert added == predicted.soft_prompt_bytes(5, num_tokens=num_tokens, num_sequences=2)


@pytest.mark.parametrize(("case", "index", "kind"), [("deepseek_v2", 0, "MLA"), ("nemotron_h", 0, "state")])
def test_prefixes_of_layers_without_plain_keys_and_values_are_refused(case: str, index: int, kind: str) -> None:
    config = config_of(case)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.{index}: keeps {kind}, .*Use a soft prompt"):
        kv_cache(config, dtype=torch.float32).prefix_bytes(5, num_tokens=10)
    options = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    prefixed = peft.get_peft_model(model_of(config), options).eval()
    with pytest.raises((RuntimeError, ValueError)):  # PEFT cannot do it either
        cache_after(prefixed, tokens(2, 10))


TOKEN_BYTES = {
    "Llama-2-7B": 2 * 32 * 32 * 128 * 2,  # 0.5 MB in half precision, as widely quoted
    "DeepSeek-V3": 70_272,  # this and the next two: arXiv:2505.09343, table 1 ("70.272 KB")
    "Qwen2.5-72B": 327_680,
    "Llama-3.1-405B": 516_096,
    "DeepSeek-V2": 60 * 576 * 2,  # arXiv:2405.04434: (4 + 1/2) d_h numbers a layer, and d_h is 128
    "Qwen3-235B-A22B": 2 * 94 * 4 * 128 * 2,  # four heads of keys and values in each of 94 layers
    "DeepSeek-V2-Lite": 31_104,  # measured with its latent cached: github.com/panbanda/higgs, pull request 254
}


@pytest.mark.parametrize("name", TOKEN_BYTES)
def test_a_token_takes_the_bytes_that_were_published(name: str) -> None:
    cache = kv_cache(KNOWN_CONFIGS[name](), dtype=torch.bfloat16)
    assert cache.token_bytes == cache.long_token_bytes == TOKEN_BYTES[name]
    assert cache.bytes_for(1000, 3) == 3000 * TOKEN_BYTES[name]


def test_deepseek_v2_keeps_less_than_deepseek_67b_by_as_much_as_its_paper_says() -> None:
    """93.3% less (arXiv:2405.04434), of which a part comes from keeping 6 bits a number instead of 16."""
    dense, latent = (
        kv_cache(KNOWN_CONFIGS[name](), dtype=torch.bfloat16).token_bytes for name in ("DeepSeek-67B", "DeepSeek-V2")
    )
    assert 1 - latent * 6 / 16 / dense == pytest.approx(0.933, abs=0.0005)


def test_deepseek_v2_would_keep_71_times_as_much_with_the_keys_and_values_of_all_heads() -> None:
    latent, expanded = (
        kv_cache(KNOWN_CONFIGS["DeepSeek-V2"](), dtype=torch.bfloat16, mla=mla).token_bytes
        for mla in ("latent", "expanded")
    )
    assert expanded == 60 * 128 * (192 + 128) * 2
    assert expanded / latent == pytest.approx(71.1, abs=0.05)


def test_a_full_window_stops_growing() -> None:
    cache = kv_cache(KNOWN_CONFIGS["Mistral-7B-v0.1"](), dtype=torch.float16)
    assert cache.bytes_for(4095) == cache.bytes_for(32_768) == 4095 * 2 * 32 * 8 * 128 * 2
    assert (cache.token_bytes, cache.long_token_bytes) == (131_072, 0)
    assert cache.soft_prompt_bytes(20, num_tokens=32_768) == 0
    # PEFT's cache for it has no windows
    assert cache.prefix_bytes(20, num_tokens=32_768) == (20 + 32_768 - 4095) * 131_072


def test_sequences_and_deltas_share_what_the_weights_leave() -> None:
    """Llama-2-7B in 24 GiB: 4,096 tokens are 2 GiB."""
    cache = kv_cache(KNOWN_CONFIGS["Llama-2-7B"](), dtype=torch.float16)
    weights, gib = 13 * 2**30, 2**30
    fit = {"weights_bytes": weights, "delta_bytes": gib}
    assert cache.num_sequences_that_fit(24 * gib, 4096, weights_bytes=weights) == 5
    assert cache.num_sequences_that_fit(24 * gib, 4096, **fit, num_deltas=1) == 5
    assert cache.num_sequences_that_fit(24 * gib, 4096, **fit, num_deltas=2) == 4
    assert cache.num_sequences_that_fit(24 * gib, 4096, **fit, num_deltas=100) == 0
    assert cache.num_deltas_that_fit(24 * gib, 4096, **fit, num_sequences=4) == 3
    assert cache.num_deltas_that_fit(24 * gib, 4096, **fit, num_sequences=6) == 0


REFUSED = {
    "bert": ({}, "nothing in its configuration says that it keeps keys and values"),
    "rwkv": ({}, "nothing in its configuration says that it keeps keys and values"),
    "t5": ({}, "it attends to another sequence too, whose length its configuration does not say"),
    "mllama": ({}, "it attends to another sequence too, whose length its configuration does not say"),
    "recurrent_gemma": ({}, "layers.0 keeps a state of which only its code knows the size"),
    "minimax": ({}, "layers.1 keeps a state of which only its code knows the size"),
    "deepseek_v32": ({}, "layers.0 is of type 'indexed_attention'"),
    "deepseek_v4": ({}, "layers.0 is of type 'heavily_compressed_attention'"),
    "mimo_v2_flash": ({}, "layers.0 has v_head_dim=128 beside head_dim=192"),
    "mistral": ({"sliding_window": 1}, "layers.0 has sliding_window=1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_cache_of_unknown_size_is_an_error(kind: str) -> None:
    changes, why = REFUSED[kind]
    with pytest.raises(UnsupportedModelError) as caught:
        kv_cache(AutoConfig.for_model(kind, **changes), dtype=torch.bfloat16)
    assert f": how much generation keeps of a sequence is not known: {why}.\n" in str(caught.value)
    assert "Generate with it once and measure the cache." in str(caught.value)


def test_a_configuration_without_the_fields_is_an_error() -> None:
    class Odd(PreTrainedConfig):
        model_type = "odd"
        keys_to_ignore_at_inference = ("past_key_values",)

    with pytest.raises(UnsupportedModelError, match=r"odd: .* its configuration lacks a field: .*num_hidden_layers"):
        kv_cache(Odd(), dtype=torch.float32)


def test_impossible_counts_are_refused() -> None:
    cache = KvCache((LayerCache("MHA", token_bytes=8),))
    with pytest.raises(ValueError, match="num_tokens must not be negative, got -1"):
        cache.bytes_for(-1)
    with pytest.raises(ValueError, match="num_sequences must not be negative, got -2"):
        cache.bytes_for(1, -2)
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        cache.num_sequences_that_fit(100, 0, weights_bytes=10)
    with pytest.raises(ValueError, match="num_deltas must not be negative, got -1"):
        cache.num_sequences_that_fit(100, 1, weights_bytes=10, delta_bytes=5, num_deltas=-1)
    with pytest.raises(ValueError, match="delta_bytes must be at least 1, got 0"):
        cache.num_deltas_that_fit(100, 1, num_sequences=1, weights_bytes=10, delta_bytes=0)
