"""Attention with a prefix, written out: what a `PrefixLayer` is compared with, family by family."""

# B batch, T tokens, H query heads, G key-value heads, P prefix tokens

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_models import FAMILIES, tiny_model

DENSE = {
    "llama_gqa": {"model_type": "llama", "num_key_value_heads": 1, "num_attention_heads": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "sliding_window": 3},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 3, "attn_logit_softcapping": 2.0},
}
CHANGES = {"deepseek_v2": {"v_head_dim": 12}, "gpt_oss": {"sliding_window": 3}}


def decoder(kind: str, *, implementation: str | None = None, seed: int = 0):
    """A tiny model of a family, with awkward head sizes, sinks, soft-capping or a window of three tokens."""
    if kind in FAMILIES:
        model = tiny_model(kind, seed=seed, **CHANGES.get(kind, {}))
    else:
        torch.manual_seed(seed)
        options = {"num_attention_heads": 2, "num_key_value_heads": 2, **DENSE[kind]}
        config = AutoConfig.for_model(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0, **options
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name and name.endswith("proj.weight"):
                parameter.mul_(8)  # attention as transformers begins is nearly uniform
    return model.eval()


class PlainAttention(nn.Module):
    """An attention module of a family, slow: every logit is computed, then masked."""

    def __init__(self, attention: nn.Module, key_GPK, value_GPV, gate: nn.Linear | None = None):
        super().__init__()
        self.attention, self.gate = attention, gate
        self.key, self.value = nn.Parameter(key_GPK.detach().clone()), nn.Parameter(value_GPV.detach().clone())
        self.padding_BT = None

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        a = self.attention
        query, key, value = self._projected(hidden_states, position_embeddings)
        groups = query.shape[1] // key.shape[1]
        key, value, own_key, own_value = (x.repeat_interleave(groups, -3) for x in (key, value, self.key, self.value))
        gate_B1T1 = 1.0 if self.gate is None else torch.sigmoid(self.gate(hidden_states)).unsqueeze(1)
        of_tokens = query @ key.transpose(-1, -2) * a.scaling
        of_prefix = query @ own_key.transpose(-1, -2) * a.scaling * gate_B1T1
        logits = torch.cat([of_prefix, of_tokens], -1)
        cap = getattr(a, "attn_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        logits = logits.masked_fill(~self._visible(hidden_states, own_key.shape[-2]), -torch.inf)
        if hasattr(a, "sinks"):
            sinks = a.sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        num = own_key.shape[-2]
        out = weights[..., num:] @ value + weights[..., :num] @ own_value * gate_B1T1
        return a.o_proj(out.transpose(1, 2).flatten(2)), None

    def _visible(self, hidden_states, num_prefix):
        count = hidden_states.shape[1]
        queries, keys = torch.arange(count)[:, None], torch.arange(count)[None]
        visible = keys <= queries
        config = self.attention.config  # Mistral's modules do not say their window themselves
        window = getattr(
            self.attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else 0
        )
        if window:
            visible = visible & (keys > queries - window)
        visible = visible[None, None]
        if self.padding_BT is not None:
            visible = visible & self.padding_BT[:, None, None].bool()
        return nn.functional.pad(visible, (num_prefix, 0), value=True)

    def _projected(self, hidden, position_embeddings):
        a, code = self.attention, sys.modules[type(self.attention).__module__]
        shape = (*hidden.shape[:2], -1)
        if hasattr(a, "kv_b_proj"):
            query = a.q_proj(hidden).view(*shape, a.qk_head_dim).transpose(1, 2)
            latent, rotated = a.kv_a_proj_with_mqa(hidden).split([a.kv_lora_rank, a.qk_rope_head_dim], -1)
            plain, turned = query.split([a.qk_nope_head_dim, a.qk_rope_head_dim], -1)
            turned, rotated = code.apply_rotary_emb(turned, rotated[:, None], position_embeddings)
            both = a.kv_b_proj(a.kv_a_layernorm(latent)).view(*shape, a.qk_nope_head_dim + a.v_head_dim).transpose(1, 2)
            key, value = both.split([a.qk_nope_head_dim, a.v_head_dim], -1)
            key = torch.cat([key, rotated.expand(-1, key.shape[1], -1, -1)], -1)
            return torch.cat([plain, turned], -1), key, value
        query, key, value = (p(hidden).view(*shape, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):
            query, key = a.q_norm(query), a.k_norm(key)
        query, key = code.apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        return query, key, value.transpose(1, 2)


def with_plain_attention(model, wrapped_layers, adapter_name: str = "default") -> list[PlainAttention]:
    """Put the plain attention of each layer's prefix into `model`, an unwrapped model of the same weights."""
    found = []
    for layer in wrapped_layers:
        parent, _, name = layer.path.rpartition(".")
        gate = dict(layer.tuned_prefix_gate.items()).get(adapter_name)
        plain = PlainAttention(model.get_submodule(layer.path), *layer.prefix(adapter_name))
        if gate is not None:
            plain.gate = nn.Linear(gate.in_features, 1)
            plain.gate.load_state_dict(gate.state_dict())
        setattr(model.get_submodule(parent), name, plain)
        found.append(plain)
    return found
