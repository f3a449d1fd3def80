"""One attention module with prefixes in front of its keys and values."""

# P prefix tokens, M width of the network that makes them, G key-value heads, K key width, V value width
# B batch, T tokens

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metier.errors import ConfigError
from metier.methods.block_layer import BlockLayer, block_input
from metier.methods.gate import gate_values, new_gate
from metier.methods.prefix.config import PrefixConfig
from metier.models.attention import head_sizes
from metier.models.attention_interface import ExtraKeys, attending_to
from metier.models.unwrap import original_module

CANNOT_MERGE = (
    "a prefix is keys and values of its own, which no weights of the base could stand for, so it cannot be merged. "
    "Serve it beside its base."
)
PREFIX_STD = 0.02
"""Of a prefix that is trained itself, as it begins."""


class PrefixLayer(BlockLayer):
    """Stands in a model for an attention module, whose queries see the active adapters' prefixes before the tokens.

    Keys are as attention has them after rotation: a prefix has no position, and tokens keep theirs. A prefix that is
    trained itself is `tuned_prefix_key.<adapter>` (G, P, K) and `tuned_prefix_value.<adapter>` (G, P, V). With a
    network it is made of `tuned_prefix_tokens.<adapter>` (P, M):

        keys, values = out(tanh(hidden(tokens)))

    The paper shares tokens and `hidden` between all layers; here each layer has its own.
    A fresh prefix takes attention away from tokens: it is no no-op.
    """

    adapter_layer_names = (
        "tuned_prefix_key",
        "tuned_prefix_value",
        "tuned_prefix_tokens",
        "tuned_prefix_hidden",
        "tuned_prefix_out",
        "tuned_prefix_gate",
    )
    cannot_merge = CANNOT_MERGE

    def __init__(self, base_layer: nn.Module, path: str, hidden_size: int) -> None:
        super().__init__(base_layer, path)
        self.hidden_size, self.sizes = hidden_size, head_sizes(base_layer, path)
        self.tuned_prefix_key, self.tuned_prefix_value = nn.ParameterDict(), nn.ParameterDict()
        self.tuned_prefix_tokens, self.tuned_prefix_gate = nn.ParameterDict(), nn.ModuleDict()
        self.tuned_prefix_hidden, self.tuned_prefix_out = nn.ModuleDict(), nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: PrefixConfig) -> None:
        """Add a prefix of small random keys and values."""
        device, sizes, length = self.base_device(), self.sizes, config.num_prefix_tokens
        key_GPK = torch.empty(sizes.num_key_value_heads, length, sizes.key_head_dim, device=device)
        value_GPV = torch.empty(sizes.num_key_value_heads, length, sizes.value_head_dim, device=device)
        if config.bottleneck is None:
            self.tuned_prefix_key[adapter_name] = nn.Parameter(key_GPK.normal_(std=PREFIX_STD))
            self.tuned_prefix_value[adapter_name] = nn.Parameter(value_GPV.normal_(std=PREFIX_STD))
        else:
            width = config.bottleneck
            made = (key_GPK.numel() + value_GPV.numel()) // length
            self.tuned_prefix_tokens[adapter_name] = nn.Parameter(torch.empty(length, width, device=device).normal_())
            self.tuned_prefix_hidden[adapter_name] = nn.Linear(width, width, device=device)
            self.tuned_prefix_out[adapter_name] = nn.Linear(width, made, device=device)
        if config.gated:
            self.tuned_prefix_gate[adapter_name] = new_gate(self.hidden_size, device)
        self.configs[adapter_name] = config
        self.set_gradients()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention module that it stands for, which attends to the prefixes of the active adapters as well.

        Raises:
            UnsupportedModelError: the module does not compute attention through transformers' interface.
            ConfigError: the model's attention implementation has no mask that a prefix could be in.
        """
        names = self.answering()
        return self._attend(names, *args, **kwargs) if names else self.base_layer(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        prefixes = [self.prefix(name) for name in names]
        extra = ExtraKeys(
            module=original_module(self.base_layer),
            path=self.path,
            key_GPK=torch.cat([key for key, _ in prefixes], 1),
            value_GPV=torch.cat([value for _, value in prefixes], 1),
            gate_BT1=self._gate(names, block_input(args, kwargs)),
        )
        with attending_to(extra):
            return self.base_layer(*args, **kwargs)

    def prefix(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """One adapter's keys (G, P, K) and values (G, P, V)."""
        if adapter_name in self.tuned_prefix_key:
            return self.tuned_prefix_key[adapter_name], self.tuned_prefix_value[adapter_name]
        sizes, tokens_PM = self.sizes, self.tuned_prefix_tokens[adapter_name]
        made = self.tuned_prefix_out[adapter_name](self.tuned_prefix_hidden[adapter_name](tokens_PM).tanh())
        made_PGN = made.view(len(tokens_PM), sizes.num_key_value_heads, -1)
        key_GPK, value_GPV = made_PGN.transpose(0, 1).split([sizes.key_head_dim, sizes.value_head_dim], -1)
        return key_GPK, value_GPV

    @torch.no_grad()
    def fold(self, adapter_name: str) -> None:
        """Keep the keys and values that the adapter's network makes, and drop the network."""
        if adapter_name not in self.tuned_prefix_tokens:
            return
        key_GPK, value_GPV = self.prefix(adapter_name)
        for part in (self.tuned_prefix_tokens, self.tuned_prefix_hidden, self.tuned_prefix_out):
            del part[adapter_name]
        self.tuned_prefix_key[adapter_name] = nn.Parameter(key_GPK.contiguous())
        self.tuned_prefix_value[adapter_name] = nn.Parameter(value_GPV.contiguous())
        self.set_gradients()

    def _gate(self, names: list[str], hidden: Tensor) -> Tensor | None:
        if not any(name in self.tuned_prefix_gate for name in names):
            return None
        if len(names) > 1:
            raise ConfigError(f"{self.path}: gated prefixes answer one at a time, got {', '.join(names)}.")
        return gate_values(self.tuned_prefix_gate[names[0]], hidden)
