"""A dense feed-forward block with mixtures of LoRA experts in it: the router, its balance, and who is trained."""

# T tokens, D hidden_size, E experts, K top_k

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.errors import UnsupportedModelError
from metier.memory.frozen_store import is_in_backward
from metier.methods.block_layer import BlockLayer
from metier.methods.mixlora.config import MixLoraConfig
from metier.methods.mixlora.mixture import Mixture
from metier.models.dense_mlp import DenseMlp
from metier.models.routed import decoder_layer_index

CANNOT_MERGE = (
    "a mixture's router gives each token other experts, so no one set of weights of the base could stand for it. "
    "Serve it beside its base."
)
ROUTER_STD = 0.02
"""Of the first routers' weights, as in MixLoRA's published code."""


class MixLoraLayer(BlockLayer):
    """Stands in a model for a dense feed-forward block, which it keeps as `base_layer`.

    An adapter's router is the parameter `mixlora_router.<adapter>` of shape (E, D), its experts are in
    `mixlora_mixture.<adapter>`.
    """

    adapter_layer_names = ("mixlora_router", "mixlora_mixture")
    other_param_names = ("configs", "balance")
    cannot_merge = CANNOT_MERGE

    def __init__(self, base_layer: nn.Module, path: str, mlp: DenseMlp) -> None:
        super().__init__(base_layer, path)
        self.mlp, self.index = mlp, decoder_layer_index(path)
        self.mixlora_router, self.mixlora_mixture = nn.ParameterDict(), nn.ModuleDict()
        self.balance: dict[str, StepLoss] = {}

    def update_layer(self, adapter_name: str, config: MixLoraConfig) -> None:
        """Add an adapter which changes nothing yet."""
        mixture = Mixture(self.mlp, self.path, config, partial(self.is_active, adapter_name))
        router_ED = nn.Parameter(torch.randn(config.num_experts, self.mlp.hidden_size) * ROUTER_STD)
        device = self.base_device()
        self.mixlora_mixture[adapter_name], self.mixlora_router[adapter_name] = mixture, router_ED
        for parameter in (*mixture.parameters(), self.mixlora_router[adapter_name]):
            if not parameter.is_meta:  # as it is where PEFT is about to load the values
                parameter.data = parameter.data.to(device)
        self.configs[adapter_name], self.balance[adapter_name] = config, StepLoss()
        self.set_gradients()

    def is_active(self, adapter_name: str) -> bool:
        """Whether an adapter has a part in this block's output now."""
        return adapter_name in self.answering()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the block that it stands for, each token through its experts; adapters active together add up."""
        names = self.answering()
        if not names:
            untouched: Tensor = self.base_layer(hidden, *args, **kwargs)
            return untouched
        if args or kwargs:
            raise UnsupportedModelError(
                f"{self.path}: was called with {len(args)} further arguments and {', '.join(kwargs) or 'no names'}, "
                "expected a hidden state alone."
            )
        hidden_TD = hidden.reshape(-1, self.mlp.hidden_size)
        out_TD: Tensor = self._mixed(names[0], hidden_TD)
        for name in names[1:]:
            out_TD = out_TD + (self._mixed(name, hidden_TD) - self.base_layer(hidden_TD))
        return out_TD.view(hidden.shape)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _mixed(self, adapter_name: str, hidden_TD: Tensor) -> Tensor:
        """The block's output with one adapter, (T, D)."""
        config, router_ED = self.configs[adapter_name], self.mixlora_router[adapter_name]
        probabilities_TE = F.linear(hidden_TD, router_ED.to(hidden_TD.dtype)).float().softmax(-1)
        top_TK, expert_ids_TK = probabilities_TE.topk(config.top_k, dim=-1)
        routing_weights_TK = top_TK / top_TK.sum(-1, keepdim=True)
        if self.training and config.router_aux_loss_coef:
            loss = balance_loss(probabilities_TE, expert_ids_TK)
            # with gradient checkpointing a layer runs again in the backward pass, where nobody would go through it
            if not is_in_backward():
                self.balance[adapter_name].value = loss
        out_TD: Tensor = self.mixlora_mixture[adapter_name](
            hidden_TD, expert_ids_TK, routing_weights_TK, with_base=True
        )
        return out_TD

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """PEFT asks for this wherever it has made an adapter's parameters trainable."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self.configs if names is None else names:
            selected = self.configs[name].experts if name in self.configs else None
            if selected is not None:
                self.mixlora_router[name].requires_grad_(False)
                mixture = self.mixlora_mixture[name]
                assert isinstance(mixture, Mixture), "made above"
                mixture.train_only(selected.get(self.index, []))


class StepLoss:
    """A loss of the last forward pass, which no copy of a model takes along."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StepLoss:
        return StepLoss()

    def __reduce__(self) -> tuple[type[StepLoss], tuple[()]]:
        return StepLoss, ()


def balance_loss(probabilities_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """How unevenly tokens are spread over experts: 1 where they are even, up to E where one expert has all.

        loss = E * sum_e f_e * P_e

    `f_e` is the share of (token, slot) pairs that expert e received, `P_e` its mean probability, through which alone
    gradients flow. Every token that passes the block counts, padding too, for a block does not know of it.

    Args:
        probabilities_TE: of the router.
        expert_ids_TK: what was chosen, int64.

    Returns:
        float32, a scalar.

    Paper: Switch Transformers, arXiv:2101.03961, equation 4, here with shares of slots for K above 1.
    """
    num_experts = probabilities_TE.shape[-1]
    ids_S = expert_ids_TK.flatten()
    count_E = probabilities_TE.new_zeros(num_experts).scatter_add_(0, ids_S, torch.ones_like(ids_S).to(torch.float32))
    return num_experts * (count_E / max(1, ids_S.numel()) * probabilities_TE.mean(0)).sum()
