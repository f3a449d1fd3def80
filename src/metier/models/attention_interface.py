"""Let an attention module attend to keys and values that no token made, in every family, whatever its cache holds.

Nearly every family of transformers computes attention by a function that it asks `AttentionInterface.get_interface`
for, and hands it the keys and values after rotation, normalisation, the cache and (where attention is latent, MLA)
expansion. There, more of them can be put in front. transformers lets one register a function under a new name; but some
families (DeepSeek V3.2, GLM MoE DSA, Gemma 4 …) compare the name with "sdpa" and "eager" and compute something else
under any other. So the name stays, and `get_interface` itself returns a wrapper, only while a module that has extra
keys runs in `attending_to`; everyone else gets what transformers gives. `tests/models/test_attention.py` pins
this against the installed transformers.
"""

# B batch, T queries, S keys of tokens, P extra keys, H query heads, G key-value heads, K key width, V value width

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import AttentionInterface

from metier.errors import ConfigError, UnsupportedModelError

IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention functions that take a mask for every query and key, which an extra key needs to be in."""

_transformers_get_interface = AttentionInterface.get_interface


@dataclass(kw_only=True, slots=True)
class ExtraKeys:
    """Keys and values that every query of a module may attend to, at no position, beside those that it may see."""

    module: nn.Module
    path: str
    """Of the module, for errors."""
    key_GPK: Tensor
    value_GPV: Tensor
    gate_BT1: Tensor | None = None
    """What each query multiplies the extra keys and values by; None for 1."""
    was_used: bool = False


_CURRENT: ContextVar[ExtraKeys | None] = ContextVar("metier_extra_keys", default=None)


@contextmanager
def attending_to(extra: ExtraKeys) -> Iterator[None]:
    """In its body, a forward pass of `extra.module` attends to the extra keys.

    Raises:
        UnsupportedModelError: the module did not call the attention interface, or with other sizes than the keys'.
        ConfigError: the model's attention implementation is none of `IMPLEMENTATIONS`.
    """
    if AttentionInterface.get_interface is not _get_interface:
        AttentionInterface.get_interface = _get_interface
    token = _CURRENT.set(extra)
    try:
        yield
    finally:
        _CURRENT.reset(token)
    if not extra.was_used:
        raise UnsupportedModelError(
            f"{extra.path}: {type(extra.module).__name__} did not call transformers' attention interface, expected one "
            "call, so that its prefix had no effect.\nUse a method that leaves attention as it is."
        )


def check_implementation(implementation: str | None, path: str) -> None:
    """Raise a ConfigError where extra keys cannot be put into the model's attention implementation."""
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"{path}: a prefix needs attention with a mask of its own, got attn_implementation={implementation!r}, "
            f"expected {' or '.join(IMPLEMENTATIONS)}.\nLoad the model with attn_implementation='sdpa', or call "
            "model.set_attn_implementation('sdpa')."
        )


def _get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
    function = _transformers_get_interface(self, attn_implementation, default)
    # a context variable cannot be traced; and no module with extra keys is compiled: their layers run as they are
    extra = None if torch.compiler.is_compiling() else _CURRENT.get()
    if extra is None:
        return function
    check_implementation(attn_implementation, extra.path)
    return functools.partial(_attend, function, attn_implementation, extra)


def _attend(
    function: Callable[..., Any],
    implementation: str,
    extra: ExtraKeys,
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSV: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """transformers' attention function with the extra keys in front: outputs (B, T, H, V), and weights or None."""
    if module is not extra.module:
        return function(module, query_BHTK, key_BGSK, value_BGSV, attention_mask, **kwargs)
    _check_call(extra, key_BGSK, value_BGSV, kwargs)
    extra.was_used = True
    num_extra, width = extra.key_GPK.shape[1], value_BGSV.shape[-1]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (num_extra, 0))
    mask = _with_extra(attention_mask, module, query_BHTK, key_BGSK, num_extra, implementation, kwargs)
    key = extra.key_GPK.to(key_BGSK.dtype).expand(len(key_BGSK), -1, -1, -1)
    value = extra.value_GPV.to(value_BGSV.dtype).expand(len(value_BGSV), -1, -1, -1)
    if extra.gate_BT1 is None:
        keys, values = torch.cat([key, key_BGSK], 2), torch.cat([value, value_BGSV], 2)
        out, weights = function(module, query_BHTK, keys, values, mask, **kwargs)
        return out, _of_tokens(weights, num_extra)
    # each query scales the extra keys by its own gate. So extra keys and tokens' keys lie in different halves of twice
    # the width, and a query has its gated self in the half of the extra keys
    gate_B1T1 = extra.gate_BT1.unsqueeze(1).to(query_BHTK.dtype)
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query_BHTK.shape[-1] ** -0.5
    query = torch.cat([query_BHTK * gate_B1T1, query_BHTK], -1)
    out, weights = function(module, query, _halves(key, key_BGSK), _halves(value, value_BGSV), mask, **kwargs)
    of_extra, of_tokens = out[..., :width], out[..., width:]
    return of_tokens + of_extra * gate_B1T1.transpose(1, 2), _of_tokens(weights, num_extra)


def _halves(extra: Tensor, tokens: Tensor) -> Tensor:
    """(B, G, P, N) and (B, G, S, N) to (B, G, P + S, 2 N), the first in the first half of the width."""
    width = tokens.shape[-1]
    return torch.cat([F.pad(extra, (0, width)), F.pad(tokens, (width, 0))], 2)


def _of_tokens(weights_BHTS: Tensor | None, num_extra: int) -> Tensor | None:
    """Attention weights as the model would return them; those of extra keys are what is missing from 1."""
    return None if weights_BHTS is None else weights_BHTS[..., num_extra:]


def _with_extra(
    mask: Tensor | None,
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    num_extra: int,
    implementation: str,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The mask with the extra keys in front, which every query sees: padding, sliding windows and all."""
    num_queries, num_keys = query_BHTK.shape[2], key_BGSK.shape[2]
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal or num_queries == 1 or implementation == "eager":  # eager attention masks nothing by itself
            return None
        # sdpa would mask by itself, query t seeing the first t keys, the extra ones among them
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BHTK.device).tril()[None, None]
    visible = True if mask.dtype == torch.bool else 0.0
    return F.pad(mask, (num_extra, 0), value=visible)


def _check_call(extra: ExtraKeys, key_BGSK: Tensor, value_BGSV: Tensor, kwargs: dict[str, Any]) -> None:
    for name, made, got in (("keys", extra.key_GPK, key_BGSK), ("values", extra.value_GPV, value_BGSV)):
        expected, found = (made.shape[0], made.shape[2]), (got.shape[1], got.shape[3])
        if expected != found:
            raise UnsupportedModelError(
                f"{extra.path}: {type(extra.module).__name__} attends with {name} of {found[0]} heads of {found[1]}, "
                f"expected {expected[0]} heads of {expected[1]} by its configuration.\n"
                "metier does not know this kind of attention; use a method that leaves it as it is."
            )
    if kwargs.get("cache") is not None:
        raise ConfigError(f"{extra.path}: a prefix cannot be used with a paged cache (continuous batching).")
