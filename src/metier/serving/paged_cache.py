"""transformers' paged KV cache, with prefixes kept apart by delta, and room for multi-head latent attention.

A request shares the blocks of an earlier one that began with the same tokens. Under another delta the same tokens have
other keys and values, so what is compared is the tokens and the delta.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

_TOKEN_BITS = 20
"""A vocabulary has fewer than a million entries; the bits above are free in what the cache compares."""
_KEY_BITS = 31 - _TOKEN_BITS
MOST_KEYS = 2**48
_NUM_DIGITS = -(-48 // _KEY_BITS)


def keyed_tokens(token_ids: Sequence[int], key: int) -> list[int]:
    """Tokens that are equal only where both the tokens and the keys are: the key's digits lie above the first ones.

    Args:
        token_ids: at least `_NUM_DIGITS` of them in a block, which are under 2**20.
        key: in [0, 2**48); 0 leaves the tokens as they are.
    """
    keyed = list(token_ids)
    for place in range(min(_NUM_DIGITS, len(keyed))):
        digit = key >> (place * _KEY_BITS) & (2**_KEY_BITS - 1)
        keyed[place] |= digit << _TOKEN_BITS
    return keyed


class DeltaCache(PagedAttentionCache):
    """A paged cache whose prefixes belong to a delta. A subclass, because attention asks for the class by name."""

    key_of: Callable[[str], int]
    """The key of a request's delta, by the request's id."""
    on_match: Callable[[str, int], None]
    """Is told how many tokens of a request's prompt were found."""

    def used_share(self) -> float:
        """Of the cache, in [0, 1], what running requests hold; prefixes that are kept for later make way for them."""
        kept = sum(x.bytes_per_block * len(x.ledger.cached_blocks) for x in self.cache_allocators.values())
        free_bytes = int(self.compute_free_capacity(relative=False)) + kept
        return float(1.0 - free_bytes / (self.num_sectors * self.bytes_per_sector))

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        num_tokens: int = super().search_prefix_match(request_id, keyed_tokens(prompt_ids, self.key_of(request_id)))
        self.on_match(request_id, num_tokens)
        return num_tokens

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        if not complete_blocks:
            return
        tokens = keyed_tokens([*state.initial_tokens, *state.generated_tokens], self.key_of(state.request_id))
        seen = SimpleNamespace(
            request_id=state.request_id, status=state.status, initial_tokens=tokens, generated_tokens=[]
        )
        super().mark_complete_blocks(seen, complete_blocks)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        size = value_states.shape[-1]
        value_states = F.pad(value_states, (0, key_states.shape[-1] - size))
        keys, values = super().update(key_states, value_states, layer_idx, kwargs)
        return keys, values[..., :size]


def cache_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration as the cache reads it: what multi-head latent attention hands it is wider than `head_dim`.

    Raises:
        ValueError: the vocabulary leaves no room for keys.
    """
    if config.vocab_size > 2**_TOKEN_BITS:
        raise ValueError(f"its vocabulary has {config.vocab_size:,} entries, expected at most {2**_TOKEN_BITS:,}")
    nope, rope, value = (getattr(config, f"{name}_head_dim", None) for name in ("qk_nope", "qk_rope", "v"))
    if nope is None or rope is None or value is None:
        return config
    read = copy.copy(config)
    read.head_dim = max(nope + rope, value)
    read.num_key_value_heads = config.num_attention_heads
    return read
