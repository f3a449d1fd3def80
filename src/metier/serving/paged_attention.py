"""Attention over a paged KV cache on a CPU, one request at a time.

transformers' own way without flash attention is one masked product of all queries with the keys of all requests: with
64 requests 63 of 64 products are thrown away. Here each request attends to its own keys alone, which also makes what
it is answered independent of who else is in the batch.
"""

# R requests, Q queries of all requests, H heads, G key-value heads, L keys of one request, D head size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from metier.serving.block_attention import attend_blocks
from metier.serving.side_work import SIDE_WORK

NAME = "metier_paged"
"""As `model.set_attn_implementation` knows it."""


def register() -> None:
    """Make the implementation known to transformers; again is harmless."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention interface has it: (1, H, Q, D), (1, G, Q, D) twice → (1, Q, H, D).

    Without `cache` each row of the batch is a whole sequence, unpadded.
    """
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    if cache is None:
        keys_and_values, sizes = [(key, value)], [query.shape[2]]
    else:
        SIDE_WORK.leave_room()
        is_plain = softcap is None and sinks is None and not sliding_window
        if is_plain and query.shape[2] == len(kwargs["cu_seq_lens_q"]) - 1:
            found = cache.store_each(key, value, layer_idx=module.layer_idx, kwargs=kwargs)
            if found is not None:
                out_RHD = attend_blocks(query.squeeze(0).transpose(0, 1), *found, scaling=scaling)
                return out_RHD[..., : value.shape[-1]].unsqueeze(0).contiguous(), None
        keys_and_values = cache.store(key, value, layer_idx=module.layer_idx, kwargs=kwargs)
        sizes = kwargs["cu_seq_lens_q"].diff().tolist()
    out = [
        _attend(own, k, v, scaling, sliding_window, softcap, sinks)
        for own, (k, v) in zip(query.split(sizes, 2), keys_and_values, strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence's last queries over all of its keys."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None if num_queries == 1 and not (window and num_keys > window) else _mask(num_queries, num_keys, window)
    if softcap is None and sinks is None:
        is_grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=is_grouped)
    return _attend_slowly(query, key, value, mask, scaling, softcap, sinks)


def _attend_slowly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What the fused kernel has no place for: capped scores, and sinks that take a share of the attention."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)], dim=-1)
    shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return shares[..., : key.shape[2]] @ value


def _mask(num_queries: int, num_keys: int, window: int | None) -> Tensor:
    """(Q, L) bool: which keys a query sees; the last query is the last key's."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    return seen if not window else seen.triu(num_keys - num_queries - window + 1)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
