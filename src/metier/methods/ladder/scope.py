"""Who may look at whom in a side network's attention: padding, records that share a row, what a cache holds."""

# B rows, T new tokens of a row, P tokens before them, K = P + T

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from metier.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Scope:
    """The attention of one forward pass, alike in all rungs."""

    num_past: int
    """P"""
    mask: Tensor | None
    """bool, (B or 1, 1, T, K), true where a token is looked at; None where nothing but causality limits."""

    @property
    def is_causal(self) -> bool:
        """Whether causality is left to the product: there is no mask, and no past that it would have to count in."""
        return self.mask is None and self.num_past == 0


def scope_of(inputs: Mapping[str, Any], *, num_past: int, has_cache: bool, hidden_BTD: Tensor) -> Scope:
    """The attention's scope from what the decoder was called with.

    Records that share a row are told apart as transformers does it for the backbone: where there is no attention mask
    and no cache, one begins wherever a position does not follow the one before it.

    Args:
        inputs: of the decoder: `attention_mask` int or bool (B, K), 0 for padding, and `position_ids` (B or 1, T).
        num_past: tokens that the cache holds already.
        has_cache: whether the decoder works with a cache.
        hidden_BTD: of the new tokens.

    Raises:
        UnsupportedModelError: an attention mask of another shape, or positions of several axes without a mask.
    """
    num_rows, num_new = hidden_BTD.shape[:2]
    num_keys = num_past + num_new
    padding, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if padding is not None and (not isinstance(padding, Tensor) or tuple(padding.shape) != (num_rows, num_keys)):
        got = f"shape {tuple(padding.shape)}" if isinstance(padding, Tensor) else type(padding).__name__
        raise UnsupportedModelError(
            f"ladder: got an attention mask of {got}, expected (rows, tokens) = {(num_rows, num_keys)}, from which "
            "the side network makes its own.\nPass the padding mask, and no cache of a fixed size."
        )
    limits: list[Tensor] = []
    if padding is not None and not bool((padding != 0).all()):
        limits.append((padding != 0)[:, None].to(hidden_BTD.device))
    if padding is None and not has_cache and positions is not None:
        records_BT = _records(positions, num_rows)
        if records_BT is not None:
            limits.append((records_BT[:, :, None] == records_BT[:, None, :]).to(hidden_BTD.device))
    if not limits and (num_past == 0 or num_new == 1):
        return Scope(num_past, None)
    key_K = torch.arange(num_keys, device=hidden_BTD.device)
    query_T1 = num_past + torch.arange(num_new, device=hidden_BTD.device)[:, None]
    mask_BTK = (key_K <= query_T1)[None]
    for limit_BTK in limits:
        mask_BTK = mask_BTK & limit_BTK
    return Scope(num_past, mask_BTK[:, None])


def _records(positions: Tensor, num_rows: int) -> Tensor | None:
    """Which record of its row each token belongs to, (B, T); None where every row is one."""
    if positions.dim() != 2:
        raise UnsupportedModelError(
            f"ladder: got positions of shape {tuple(positions.shape)} and no attention mask, expected (rows, tokens), "
            "from which records that share a row are told apart.\nPass an attention mask."
        )
    records_BT: Tensor | None = find_packed_sequence_indices(positions.expand(num_rows, -1))
    return records_BT
