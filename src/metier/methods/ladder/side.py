"""The side network: a small pre-norm transformer that mixes the backbone's hidden state into its own at every rung."""

# B rows, T new tokens of a row, K tokens that are looked at, D hidden_size of the backbone, S side_size, H heads,
# M inner width of the MLP

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.methods.ladder.config import LadderConfig
from metier.methods.ladder.scope import Scope

ROPE_BASE = 10000.0
EPSILON = 1e-6

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""New keys and values (B, H, T, S/H) to all that are looked at (B, H, K, S/H)."""


class SideRung(nn.Module):
    """One rung: `side = block(gate * down(hidden) + (1 - gate) * side)`, the gate being `sigmoid(alpha / T)`.

    Hidden states of different layers differ in size by orders of magnitude, so they are divided by their root mean
    square before they are projected, which the paper's T5 has no need of. The first rung makes the first side state of
    what comes into its layer: with a rung at every layer the embeddings, as in the paper.

    Paper: LST, arXiv:2206.06522, section 3.
    """

    def __init__(self, hidden_size: int, config: LadderConfig, *, is_first: bool) -> None:
        super().__init__()
        side_size = config.side_size(hidden_size)
        mlp_size = max(1, round(config.mlp_factor * side_size))
        self.num_heads, self.temperature = config.num_heads, config.temperature
        self.alpha = nn.Parameter(torch.zeros(1))
        self.down = _matrix(side_size, hidden_size)
        if is_first:
            self.start = _matrix(side_size, hidden_size)
        self.attention_norm = nn.Parameter(torch.ones(side_size))
        self.qkv, self.attention_out = _matrix(3 * side_size, side_size), _matrix(side_size, side_size)
        self.mlp_norm = nn.Parameter(torch.ones(side_size))
        self.mlp_gate_up, self.mlp_down = _matrix(2 * mlp_size, side_size), _matrix(side_size, mlp_size)

    def forward(
        self, side_BTS: Tensor | None, before_BTD: Tensor, after_BTD: Tensor, scope: Scope, remember: Remember | None
    ) -> Tensor:
        """The next side state, (B, T, S).

        Args:
            side_BTS: of the rung below; None at the first one.
            before_BTD: what came into the decoder layer; the first rung alone looks at it.
            after_BTD: what came out of it.
            scope: of the attention.
            remember: where there is a cache, puts keys and values into it and returns all it holds.
        """
        if side_BTS is None:
            side_BTS = _linear(_normed(before_BTD), self.start)
        gate = torch.sigmoid(self.alpha.float() / self.temperature).to(side_BTS.dtype)
        side_BTS = gate * _linear(_normed(after_BTD), self.down) + (1 - gate) * side_BTS
        side_BTS = side_BTS + self._attend(_normed(side_BTS, self.attention_norm), scope, remember)
        gate_BTM, up_BTM = _linear(_normed(side_BTS, self.mlp_norm), self.mlp_gate_up).chunk(2, dim=-1)
        return side_BTS + _linear(F.silu(gate_BTM) * up_BTM, self.mlp_down)

    def _attend(self, normed_BTS: Tensor, scope: Scope, remember: Remember | None) -> Tensor:
        qkv = _linear(normed_BTS, self.qkv).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query_BHTX, key_BHTX, value_BHTX = qkv.unbind()
        query_BHTX, key_BHKX = _rotated(query_BHTX, scope.num_past), _rotated(key_BHTX, scope.num_past)
        value_BHKX = value_BHTX
        if remember is not None:
            key_BHKX, value_BHKX = remember(key_BHKX, value_BHTX)
        mask = None if scope.mask is None else scope.mask.to(query_BHTX.device)
        out_BHTX = F.scaled_dot_product_attention(
            query_BHTX, key_BHKX, value_BHKX, attn_mask=mask, is_causal=scope.is_causal
        )
        return _linear(out_BHTX.transpose(1, 2).flatten(2), self.attention_out)


class SideHead(nn.Module):
    """The last side state projected up to the backbone's width; its weights begin as 0, so that it adds nothing."""

    def __init__(self, hidden_size: int, config: LadderConfig) -> None:
        super().__init__()
        side_size = config.side_size(hidden_size)
        self.norm = nn.Parameter(torch.ones(side_size))
        self.up = nn.Parameter(torch.zeros(hidden_size, side_size))

    def forward(self, side_BTS: Tensor) -> Tensor:
        """(B, T, D)"""
        return _linear(_normed(side_BTS, self.norm), self.up)


def _matrix(num_outputs: int, num_inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(num_outputs, num_inputs) / math.sqrt(num_inputs))


def _linear(inputs: Tensor, weight_OI: Tensor) -> Tensor:
    """In the dtype of the inputs, float32 weights or not."""
    return F.linear(inputs, weight_OI.to(inputs.dtype))


def _normed(inputs: Tensor, weight: Tensor | None = None) -> Tensor:
    """Divided by the root mean square of the last axis, in float32, and multiplied by a weight if there is one."""
    wide = inputs.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return (normed if weight is None else normed * weight.float()).to(inputs.dtype)


def _rotated(values_BHTX: Tensor, num_past: int) -> Tensor:
    """Rotary positions by place in the row.

    Only differences of places count in a product, and within a record those are the differences of positions, whatever
    padding or other records stand before it.
    """
    half = values_BHTX.shape[-1] // 2
    place_T = torch.arange(num_past, num_past + values_BHTX.shape[-2], device=values_BHTX.device)
    frequency = ROPE_BASE ** (-torch.arange(half, device=values_BHTX.device, dtype=torch.float32) / half)
    angle_TX = place_T[:, None] * frequency
    cos, sin = angle_TX.cos().to(values_BHTX.dtype), angle_TX.sin().to(values_BHTX.dtype)
    first, second = values_BHTX.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
