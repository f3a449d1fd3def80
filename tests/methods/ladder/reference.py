"""A ladder as the paper's formulas say it: one row, one record and one token after another, nothing kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weight


def rotated(x: Tensor, place: int) -> Tensor:
    """Pairs (x[i], x[i + half]) turned by `place * 10000 ** (-i / half)`."""
    half, out = len(x) // 2, []
    turned = torch.complex(x[:half], x[half:])
    for i in range(half):
        angle = torch.tensor(place * 10000 ** (-i / half))
        out.append(turned[i] * torch.polar(torch.tensor(1.0), angle))
    return torch.cat([torch.stack(out).real, torch.stack(out).imag])


def side_of_record(rungs, head, hidden_states: list[Tensor]) -> Tensor:
    """What is added to the backbone's last hidden state, (tokens, D).

    Args:
        rungs: (number of the decoder layer, SideRung), bottom up.
        head: SideHead.
        hidden_states: (tokens, D) before the first layer, and after each.
    """
    first = rungs[0][0]
    side = [rungs[0][1].start @ rms(x) for x in hidden_states[first]]
    for number, rung in rungs:
        gate = 1 / (1 + torch.exp(-rung.alpha / rung.temperature))
        side = [
            gate * (rung.down @ rms(x)) + (1 - gate) * s for x, s in zip(hidden_states[number + 1], side, strict=True)
        ]
        side = [s + a for s, a in zip(side, attention(rung, side), strict=True)]
        for place, s in enumerate(side):
            inner_gate, inner_up = (rung.mlp_gate_up @ rms(s, rung.mlp_norm)).chunk(2)
            side[place] = s + rung.mlp_down @ (F.silu(inner_gate) * inner_up)
    return torch.stack([head.up @ rms(s, head.norm) for s in side])


def attention(rung, side: list[Tensor]) -> list[Tensor]:
    size, heads = len(side[0]), rung.num_heads
    width, out = size // heads, []
    qkv = [(rung.qkv @ rms(s, rung.attention_norm)).view(3, heads, width) for s in side]
    for place in range(len(side)):
        found = []
        for head in range(heads):
            query = rotated(qkv[place][0, head], place)
            keys = torch.stack([rotated(qkv[k][1, head], k) for k in range(place + 1)])
            values = torch.stack([qkv[k][2, head] for k in range(place + 1)])
            found.append((keys @ query / math.sqrt(width)).softmax(0) @ values)
        out.append(rung.attention_out @ torch.cat(found))
    return out
