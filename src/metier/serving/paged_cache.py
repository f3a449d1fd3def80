"""transformers' paged KV cache, with prefixes kept apart by delta, and room for multi-head latent attention.

A request shares the blocks of an earlier one that began with the same tokens. Under another delta the same tokens have
other keys and values, so what is compared is the tokens and the delta.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION

from metier.serving.block_attention import BlockPlan, plan_blocks

_TOKEN_BITS = 20
"""A vocabulary has fewer than a million entries; the bits above are free in what the cache compares."""
_KEY_BITS = 31 - _TOKEN_BITS
MOST_KEYS = 2**48
NOBODY = MOST_KEYS - 1
"""The key of requests that are not known any more: it is no delta's, and not the base's."""
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
    _last_spans: tuple[Tensor, list[Callable[[Tensor], Tensor]]] | None = None
    _last_plan: tuple[Tensor, BlockPlan] | None = None
    _is_finite = True
    """Whether all keys and values were that were ever kept."""

    def share_held(self) -> float:
        """Of the blocks, those that requests hold; not those of prefixes that are kept for later."""
        kept = sum(len(x.ledger.cached_blocks) * x.bytes_per_block for x in self.cache_allocators.values())
        num_free: int = self.compute_free_capacity(relative=False) + kept
        num_bytes: int = self.num_sectors * self.bytes_per_sector
        return max(0.0, 1.0 - num_free / num_bytes)

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
        self._note_finite(key_states, value_states)
        keys, values = super().update(key_states, _padded(value_states, key_states), layer_idx, kwargs)
        return keys, values[..., : value_states.shape[-1]]

    def store(
        self, key_states: Tensor, value_states: Tensor, *, layer_idx: int, kwargs: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        """Keep the new keys and values of a step, and give each request all of its own, (1, G, L, D) each.

        Of a request that lies in one block they are looked at where they are. The others' are copied one by one, so
        that a copy is still in the processor's cache when it is read.

        Args:
            key_states: of all requests' new tokens, (1, G, Q, D).
            kwargs: what transformers hands to attention.
        """
        allocator, size = self.layer_to_allocator[layer_idx], value_states.shape[-1]
        ends = kwargs["cu_seq_lens_k"][allocator.layer_type]
        read_index = kwargs["read_index"][allocator.index]
        if allocator.layer_type != FULL_ATTENTION or not len(read_index):
            sizes = ends.diff().tolist()
            both = self.update(key_states, value_states, layer_idx, kwargs)
            return list(zip(*(states.split(sizes, 2) for states in both), strict=True))
        kept = self._keep(key_states, value_states, allocator, layer_idx, kwargs)
        spans = self._spans(read_index, ends, allocator.tokens_per_page)
        return [
            (of_keys.transpose(0, 1).unsqueeze(0), of_values.transpose(0, 1).unsqueeze(0)[..., :size])
            for of_keys, of_values in ([span(cached) for cached in kept] for span in spans)
        ]

    def store_each(
        self, key_states: Tensor, value_states: Tensor, *, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, BlockPlan] | None:
        """Keep the new keys and values of a step in which each request adds one token, where that can be attended to
        block by block: (tokens, G, D) of the layer's whole cache twice, and where the requests' blocks lie in it.

        Returns:
            None where it cannot; then nothing is kept.
        """
        allocator = self.layer_to_allocator[layer_idx]
        read_index = kwargs["read_index"][allocator.index]
        if allocator.layer_type != FULL_ATTENTION or not len(read_index) or not self._is_finite:
            return None
        kept = self._keep(key_states, value_states, allocator, layer_idx, kwargs)
        if self._last_plan is None or self._last_plan[0] is not read_index:
            sizes = kwargs["cu_seq_lens_k"][allocator.layer_type].diff().tolist()
            plan = _plan(read_index, sizes, allocator.tokens_per_page, allocator.block_physical_stride)
            self._last_plan = read_index, plan
        return *kept, self._last_plan[1]

    def _keep(
        self, key_states: Tensor, value_states: Tensor, allocator: Any, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a step to their places; the layer's keys and values, (tokens, G, D)."""
        kept: tuple[Tensor, Tensor] = allocator._kv_token_views[layer_idx]
        write_index = kwargs["write_index"][allocator.index]
        for cached, states in zip(kept, (key_states, _padded(value_states, key_states)), strict=True):
            cached.index_copy_(0, write_index, states.squeeze(0).transpose(0, 1))
        self._note_finite(key_states, value_states)
        return kept

    def _note_finite(self, key_states: Tensor, value_states: Tensor) -> None:
        # what is masked weighs nothing, but nothing times infinity is not a number
        self._is_finite = self._is_finite and bool((key_states.sum() + value_states.sum()).isfinite())

    def _spans(self, read_index: Tensor, ends: Tensor, block_tokens: int) -> list[Callable[[Tensor], Tensor]]:
        """For each request how to get its tokens, in order, of a layer's cache; the same for all layers of a step."""
        if self._last_spans is None or self._last_spans[0] is not read_index:
            parts = read_index.split(ends.diff().tolist())
            firsts = torch.stack([part[0] for part in parts]).tolist()
            spans: list[Callable[[Tensor], Tensor]] = [
                partial(torch.narrow, dim=0, start=first, length=len(part))
                if len(part) <= block_tokens
                else partial(torch.index_select, dim=0, index=part)
                for part, first in zip(parts, firsts, strict=True)
            ]
            self._last_spans = read_index, spans
            return spans
        return self._last_spans[1]


def _plan(read_index: Tensor, sizes: list[int], block_tokens: int, stride: int) -> BlockPlan:
    """Where the blocks of requests of these sizes lie."""
    num_blocks = [-(-size // block_tokens) for size in sizes]
    begins = accumulate(sizes, initial=0)
    places = [begin + i * block_tokens for begin, num in zip(begins, num_blocks, strict=False) for i in range(num)]
    firsts = iter(read_index[torch.tensor(places)].tolist())
    return plan_blocks(
        [list(islice(firsts, num)) for num in num_blocks], sizes, block_tokens=block_tokens, stride=stride
    )


def _padded(value_states: Tensor, key_states: Tensor) -> Tensor:
    """Values as wide as keys, which is what the cache keeps."""
    return F.pad(value_states, (0, key_states.shape[-1] - value_states.shape[-1]))


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
