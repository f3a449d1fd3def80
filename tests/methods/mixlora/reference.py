"""A mixture of LoRA experts as the papers' formulas say it: every token through whole changed weights, expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mixed(layer, adapter_name: str, hidden_TD: Tensor) -> Tensor:
    """The block's output, (T, D), from the layer's parameters alone."""
    config, mixture = layer.configs[adapter_name], layer.mixlora_mixture[adapter_name]
    out = []
    for token in hidden_TD:
        probabilities = (layer.mixlora_router[adapter_name] @ token).softmax(0)
        chosen = probabilities.argsort(descending=True)[: config.top_k]
        weights = probabilities[chosen] / probabilities[chosen].sum()
        outs = [
            changed_mlp(layer.base_layer, mixture.pairs[int(e)], config.lora_alpha / config.r, token) for e in chosen
        ]
        out.append(sum(weight * one for weight, one in zip(weights, outs, strict=True)))
    return torch.stack(out)


def changed_mlp(mlp, pairs, scale: float, token: Tensor) -> Tensor:
    """One token through the block with `W + s B A` for each W."""
    down_delta = scale * pairs.down_b @ pairs.down_a
    deltas = [scale * b @ a for a, b in zip(pairs.up_a, pairs.up_b, strict=True)]
    kind = type(mlp).__name__
    if kind == "GPT2MLP":  # its weights are transposed
        inner = mlp.act(token @ (mlp.c_fc.weight + deltas[0].T) + mlp.c_fc.bias)
        return inner @ (mlp.c_proj.weight + down_delta.T) + mlp.c_proj.bias
    if kind == "PhiMLP":
        inner = mlp.activation_fn(F.linear(token, mlp.fc1.weight + deltas[0], mlp.fc1.bias))
        return F.linear(inner, mlp.fc2.weight + down_delta, mlp.fc2.bias)
    if kind == "Phi3MLP":
        gate, up = F.linear(token, mlp.gate_up_proj.weight + deltas[0]).chunk(2)
        return F.linear(mlp.activation_fn(gate) * up, mlp.down_proj.weight + down_delta)
    gate = F.linear(token, mlp.gate_proj.weight + deltas[0])
    up = F.linear(token, mlp.up_proj.weight + deltas[1])
    return F.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight + down_delta)
