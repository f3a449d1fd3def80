"""Attention of packed requests, against each request's own masked product."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from metier.serving.paged_attention import paged_attention

HEADS, SIZE = 4, 8
# float64: what is left is the order of summation
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
SEQUENCES = [(1, 1), (1, 9), (5, 5), (3, 7), (1, 40)]
"""Queries and keys of each request: decoding, a whole prompt, a part of one."""


class Cache:
    """Gives each request its keys and values, as a paged cache does."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        sizes = [keys for _, keys in SEQUENCES]
        self.parts = list(zip(key.split(sizes, 2), value.split(sizes, 2), strict=True))

    def store(self, key_states: Tensor, value_states: Tensor, *, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        return self.parts


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One query of one head after the other."""
    repeats = q.shape[1] // k.shape[1]
    out = torch.empty(1, q.shape[2], q.shape[1], v.shape[-1], dtype=q.dtype)
    for head in range(q.shape[1]):
        for row in range(q.shape[2]):
            place = k.shape[2] - q.shape[2] + row
            first = max(0, place - window + 1) if window else 0
            keys, values = (t[0, head // repeats, first : place + 1] for t in (k, v))
            scores = keys @ q[0, head, row] * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            shares = scores.softmax(0)[: len(keys)]
            out[0, row, head] = shares @ values
    return out


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("extra", ["none", "softcap", "sinks"])
def test_every_request_attends_to_its_own_keys_alone(groups: int, window: int | None, extra: str) -> None:
    torch.manual_seed(0)
    num_q, num_k = (sum(sizes) for sizes in zip(*SEQUENCES, strict=True))
    q = torch.randn(1, HEADS, num_q, SIZE, dtype=torch.float64)
    k = torch.randn(1, groups, num_k, SIZE, dtype=torch.float64)
    v = torch.randn(1, groups, num_k, 6, dtype=torch.float64)
    softcap = 0.8 if extra == "softcap" else None
    sinks = torch.randn(HEADS, dtype=torch.float64) if extra == "sinks" else None
    ends_q, ends_k = (torch.tensor([0, *sizes]).cumsum(0) for sizes in zip(*SEQUENCES, strict=True))
    got, _ = paged_attention(
        SimpleNamespace(layer_idx=0),
        q,
        q.new_empty(0),
        q.new_empty(0),
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
        cache=Cache(k, v),
        cu_seq_lens_q=ends_q,
        cu_seq_lens_k={"full_attention": ends_k},
    )
    parts, q0, k0 = [], 0, 0
    for queries, keys in SEQUENCES:
        own = q[:, :, q0 : q0 + queries], k[:, :, k0 : k0 + keys], v[:, :, k0 : k0 + keys]
        parts.append(reference(*own, window=window, softcap=softcap, sinks=sinks))
        q0, k0 = q0 + queries, k0 + keys
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if extra != "none" else TOLERANCE  # their shares are float32
    torch.testing.assert_close(got, torch.cat(parts, dim=1), **tolerance)


def test_without_a_cache_a_row_is_a_whole_sequence() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, 5, SIZE, dtype=torch.float64) for _ in range(3))
    got, _ = paged_attention(SimpleNamespace(layer_idx=0), q, k, v, None, scaling=0.3)
    for row in range(2):
        own = (t[row : row + 1] for t in (q, k, v))
        want = reference(*own, window=None, softcap=None, sinks=None)
        torch.testing.assert_close(got[row : row + 1], want, **TOLERANCE)
