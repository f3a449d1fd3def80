"""Bytes of the keys, values and states that generation keeps, layer by layer, from a configuration alone.

Which layer keeps what is asked of transformers itself; how wide that is follows from the configuration's fields. Where
they do not say it, there is an error and no number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from metier.errors import UnsupportedModelError

MlaCache = Literal["latent", "expanded"]
"""What multi-head latent attention keeps of a token: the latent that all heads share, or every head's key and value."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps of one sequence."""

    kind: str
    """MHA, GQA, MQA, MLA, "state" (of a fixed size), both ("GQA + state"), or "nothing"."""
    token_bytes: int = 0
    """Of one token's key and value."""
    window: int | None = None
    """Of a layer that attends to its last tokens or to one chunk: how many, the newest one included."""
    state_bytes: int = 0

    def __str__(self) -> str:
        return self.kind if self.window is None else f"{self.kind}, sliding window of {self.window}"

    def bytes_for(self, num_tokens: int) -> int:
        """Kept between two steps; a window keeps one token less than it is wide, as the next one is still to come."""
        kept = num_tokens if self.window is None else min(num_tokens, self.window - 1)
        return self.token_bytes * kept + self.state_bytes


@dataclass(frozen=True, slots=True)
class KvCache:
    """What a model keeps while it generates. Bytes are those of tensors; a server's pages round them up."""

    layers: tuple[LayerCache, ...]
    windows_survive_prefix: bool = True
    """Whether PEFT's prefix tuning leaves the windows of this model in place."""

    @property
    def token_bytes(self) -> int:
        """By which a sequence grows with each token, until a window is full."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def long_token_bytes(self) -> int:
        """By which a sequence grows with each token once every window is full."""
        return sum(layer.token_bytes for layer in self.layers if layer.window is None)

    @property
    def state_bytes(self) -> int:
        """Of a sequence, however long it is."""
        return sum(layer.state_bytes for layer in self.layers)

    def bytes_for(self, num_tokens: int, num_sequences: int = 1) -> int:
        """Kept of sequences of `num_tokens` each, prompt and answer together."""
        _not_negative(num_tokens=num_tokens, num_sequences=num_sequences)
        return num_sequences * sum(layer.bytes_for(num_tokens) for layer in self.layers)

    def bytes_after_prompt(self, num_tokens: int, num_sequences: int = 1) -> int:
        """What transformers holds once a prompt went through in one piece, until the next token comes.

        A window's tensors are slices then, which keep the storage of the whole prompt alive.
        """
        return self._without_windows().bytes_for(num_tokens, num_sequences)

    def soft_prompt_bytes(self, num_virtual_tokens: int, *, num_tokens: int, num_sequences: int = 1) -> int:
        """What prompt tuning adds: every sequence is longer by that many tokens."""
        longer = self.bytes_for(num_tokens + num_virtual_tokens, num_sequences)
        return longer - self.bytes_for(num_tokens, num_sequences)

    def prefix_bytes(self, num_virtual_tokens: int, *, num_tokens: int, num_sequences: int = 1) -> int:
        """What prefix tuning with PEFT adds: a key and a value of each virtual token in every layer and sequence.

        For most models PEFT puts a cache without windows in place of the model's own, and all tokens are kept in every
        layer; that is counted too.

        Raises:
            UnsupportedModelError: there are layers whose cache has another form than PEFT's prefixes.
        """
        for index, layer in enumerate(self.layers):
            if layer.kind not in ("MHA", "GQA", "MQA") or layer.token_bytes != self.layers[0].token_bytes:
                raise UnsupportedModelError(
                    f"layers.{index}: keeps {layer}, {layer.token_bytes:,} bytes a token. PEFT's prefixes are keys and "
                    "values of the same heads in every layer. Use a soft prompt (prompt tuning) instead."
                )
        kept = self if self.windows_survive_prefix else self._without_windows()
        longer = kept.bytes_for(num_tokens + num_virtual_tokens, num_sequences)
        return longer - self.bytes_for(num_tokens, num_sequences)

    def num_sequences_that_fit(
        self, memory_bytes: int, num_tokens: int, *, weights_bytes: int, delta_bytes: int = 0, num_deltas: int = 0
    ) -> int:
        """How many sequences of `num_tokens` can be served beside the base and its deltas; 0 where none can.

        Args:
            memory_bytes: of the device, less what activations and the runtime take.
            num_tokens: of each sequence, prompt, virtual tokens and answer together.
            weights_bytes: of the base.
            delta_bytes: of one delta.
            num_deltas: loaded at the same time.
        """
        _not_negative(
            memory_bytes=memory_bytes, weights_bytes=weights_bytes, delta_bytes=delta_bytes, num_deltas=num_deltas
        )
        sequence_bytes = self.bytes_for(num_tokens)
        if not sequence_bytes:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        return max(0, memory_bytes - weights_bytes - delta_bytes * num_deltas) // sequence_bytes

    def num_deltas_that_fit(
        self, memory_bytes: int, num_tokens: int, *, num_sequences: int, weights_bytes: int, delta_bytes: int
    ) -> int:
        """How many deltas can be loaded beside the base and the cache of `num_sequences`; 0 where none can."""
        _not_negative(memory_bytes=memory_bytes, weights_bytes=weights_bytes)
        if delta_bytes < 1:
            raise ValueError(f"delta_bytes must be at least 1, got {delta_bytes}")
        return max(0, memory_bytes - weights_bytes - self.bytes_for(num_tokens, num_sequences)) // delta_bytes

    def _without_windows(self) -> KvCache:
        return replace(self, layers=tuple(replace(layer, window=None) for layer in self.layers))


def kv_cache(config: PreTrainedConfig, *, dtype: torch.dtype, mla: MlaCache = "latent") -> KvCache:
    """What a model of this configuration keeps while it generates.

    Args:
        config: any; of a model for several media, that of its text decoder counts.
        dtype: of keys and values. States of recurrent layers stay in float32, their convolutions' are of `dtype`.
        mla: "latent" for transformers (since its pull request 47761) and vLLM, kv_lora_rank + qk_rope_head_dim numbers
            a token and layer; "expanded" for code that keeps every head's key and value, such as DeepSeek's own.

    Raises:
        UnsupportedModelError: the fields do not say how much a layer keeps.
    """
    text = config.get_text_config(decoder=True)
    _check_decoder(text)
    try:
        kinds, options = get_layer_types_and_kwargs(text)
        layers = tuple(
            _layer(index, kind, own.get("sliding_window"), layer_config, dtype, mla)
            for index, (kind, own, layer_config) in enumerate(zip(kinds, options, text.per_layer_config, strict=True))
        )
    except AttributeError as error:
        raise _unsupported(text, f"its configuration lacks a field: {error}") from error
    keeps_windows = text.model_type.startswith(("gemma2", "gemma3_text", "gemma4"))
    return KvCache(layers, windows_survive_prefix=keeps_windows or not any(layer.window for layer in layers))


def _check_decoder(config: Any) -> None:
    if config.is_encoder_decoder or getattr(config, "cross_attention_layers", None):
        raise _unsupported(config, "it attends to another sequence too, whose length its configuration does not say")
    says_cache = "past_key_values" in getattr(config, "keys_to_ignore_at_inference", ())
    if not says_cache and getattr(config, "layer_types", None) is None:
        raise _unsupported(config, "nothing in its configuration says that it keeps keys and values")


def _layer(index: int, kind: str, window: int | None, config: Any, dtype: torch.dtype, mla: MlaCache) -> LayerCache:
    if kind == "dummy":
        return LayerCache("nothing")
    if kind not in _ATTENTION | _RECURRENT:
        raise _unsupported(config, f"layers.{index} is of type '{kind}'")
    if window is not None and window < 2:
        raise _unsupported(config, f"layers.{index} has sliding_window={window}")
    state_bytes = _state_bytes(index, config, dtype) if kind in _RECURRENT else 0
    if kind not in _ATTENTION:
        return LayerCache("state", state_bytes=state_bytes)
    name, num_numbers = _attention(index, config, mla)
    name = f"{name} + state" if state_bytes else name
    return LayerCache(name, num_numbers * dtype.itemsize, window, state_bytes)


_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "hybrid"})
_RECURRENT = frozenset({"conv", "linear_attention", "hybrid"})


def _attention(index: int, config: Any, mla: MlaCache) -> tuple[str, int]:
    """The kind of a layer's attention, and how many numbers it keeps of a token."""
    num_heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        if mla == "latent":
            return "MLA", config.kv_lora_rank + config.qk_rope_head_dim
        return "MLA", num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    for field in ("v_head_dim", "swa_head_dim", "swa_v_head_dim"):
        if getattr(config, field, None) not in (None, head_dim):
            raise _unsupported(
                config, f"layers.{index} has {field}={getattr(config, field)} beside head_dim={head_dim}"
            )
    num_kv_heads = _num_kv_heads(config)
    kind = "MHA" if num_kv_heads == num_heads else "MQA" if num_kv_heads == 1 else "GQA"
    return kind, 2 * num_kv_heads * head_dim


def _num_kv_heads(config: Any) -> int:
    if getattr(config, "new_decoder_architecture", False):
        # Falcon repeats its few key and value heads for every query head before it keeps them
        return int(config.num_attention_heads)
    if getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _state_bytes(index: int, config: Any, dtype: torch.dtype) -> int:
    """Of a convolution's last inputs and of a recurrent state."""
    count = _STATES.get(config.model_type)
    if count is None or getattr(config, "number_of_conv_states", 1) != 1:
        raise _unsupported(config, f"layers.{index} keeps a state of which only its code knows the size")
    num_conv, num_recurrent = count(config)
    return num_conv * dtype.itemsize + num_recurrent * torch.float32.itemsize


def _mamba2(
    num_heads: str, head_dim: str, num_groups: str, state: str, kernel: str
) -> Callable[[Any], tuple[int, int]]:
    def count(config: Any) -> tuple[int, int]:
        inner, state_size = getattr(config, num_heads) * getattr(config, head_dim), getattr(config, state)
        return (inner + 2 * getattr(config, num_groups) * state_size) * getattr(config, kernel), inner * state_size

    return count


def _mamba(config: Any) -> tuple[int, int]:
    inner = config.mamba_expand * config.hidden_size
    return inner * config.mamba_d_conv, inner * config.mamba_d_state


def _gated_delta_net(config: Any) -> tuple[int, int]:
    value_dim = config.linear_num_value_heads * config.linear_value_head_dim
    conv_dim = 2 * config.linear_num_key_heads * config.linear_key_head_dim + value_dim
    return conv_dim * config.linear_conv_kernel_dim, value_dim * config.linear_key_head_dim


def _short_convolution(config: Any) -> tuple[int, int]:
    return config.hidden_size * config.conv_L_cache, 0


_BAMBA = _mamba2("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
_STATES: dict[str, Callable[[Any], tuple[int, int]]] = {
    "nemotron_h": _mamba2("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    "mamba2": _mamba2("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"),
    **dict.fromkeys(("bamba", "granitemoehybrid", "falcon_h1"), _BAMBA),
    "jamba": _mamba,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _gated_delta_net),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _short_convolution),
}
"""Numbers in the convolution's state and in the recurrent one of a layer, for the families whose code was read."""


def _unsupported(config: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.model_type}: how much generation keeps of a sequence is not known: {why}.\n"
        "Expected a decoder with attention of one shape a layer, sliding windows, latent attention or a known kind of "
        "state. Generate with it once and measure the cache."
    )


def _not_negative(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
