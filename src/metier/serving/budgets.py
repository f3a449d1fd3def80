"""What a server's memory is given to: the base's weights as they are, then the KV cache, then deltas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from metier.errors import ServingError
from metier.memory.memory_limit import memory_limit_bytes
from metier.planning.kv_cache import kv_cache

_SHARE_FOR_CACHE, _SHARE_FOR_DELTAS = 0.4, 0.4
"""Of what the weights leave. The rest is for the activations of a step and the runtime."""
_SHARE_OF_HOST = 0.25
"""Of the host's memory for copies of deltas, where the accelerator is another device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    weights_bytes: int
    cache_tokens: int
    """Whose keys and values are kept, of all requests together."""
    token_bytes: int
    """Of one token's keys and values in all layers."""
    delta_bytes: int
    """On the accelerator."""
    host_bytes: int
    """For copies on the host; 0 where the accelerator is the host's memory, so that a delta is there or on the disk."""

    def __str__(self) -> str:
        """For the start of a server."""
        cache = self.cache_tokens * self.token_bytes
        parts = [
            f"weights {_gib(self.weights_bytes)}",
            f"KV cache of {self.cache_tokens:,} tokens {_gib(cache)}",
            f"deltas up to {_gib(self.delta_bytes)}",
        ]
        return ", ".join(
            [*parts, f"their copies on the host up to {_gib(self.host_bytes)}"][: 4 if self.host_bytes else 3]
        )


def budgets(
    model: PreTrainedModel,
    *,
    device_memory_bytes: int | None,
    delta_memory_bytes: int | None,
    cache_tokens: int | None,
    most_tokens: int,
) -> Budgets:
    """Part a device's memory.

    Args:
        model: with its weights on the device.
        device_memory_bytes: for all of it; None for what the device has.
        delta_memory_bytes: for deltas; None for a share of what the weights leave.
        cache_tokens: None for a share of what the weights leave, or `most_tokens` where those are fewer.
        most_tokens: that the largest batch can need.

    Raises:
        ServingError: they do not fit.
        UnsupportedModelError: as `kv_cache`.
    """
    device = model.device
    weights = sum(parameter.nbytes for parameter in {p.data_ptr(): p for p in model.parameters()}.values())
    total = device_memory_bytes or _device_bytes(device)
    left = total - weights
    token_bytes = kv_cache(model.config.get_text_config(), dtype=model.dtype, mla="expanded").token_bytes
    if cache_tokens is None:
        cache_tokens = max(0, min(most_tokens, int(left * _SHARE_FOR_CACHE) // token_bytes))
    deltas = max(0, int(left * _SHARE_FOR_DELTAS)) if delta_memory_bytes is None else delta_memory_bytes
    needed = weights + cache_tokens * token_bytes + deltas
    if needed > total or cache_tokens == 0:
        raise ServingError(
            f"serve: the weights take {weights:,} bytes, {cache_tokens:,} tokens of KV cache "
            f"{cache_tokens * token_bytes:,} and deltas {deltas:,}, in all {needed:,}, where there are {total:,}.\n"
            "Give more memory (--device-memory), or less to deltas (--delta-memory) or the cache (--cache-tokens)."
        )
    host = 0 if device.type == "cpu" else int(memory_limit_bytes() * _SHARE_OF_HOST)
    return Budgets(
        weights_bytes=weights, cache_tokens=cache_tokens, token_bytes=token_bytes, delta_bytes=deltas, host_bytes=host
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_limit_bytes()
