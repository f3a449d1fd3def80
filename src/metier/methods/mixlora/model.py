"""The MixLoRA tuner: make mixtures of a dense model's feed-forward blocks, through PEFT's own machinery."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from metier.errors import ConfigError, SelectionError, UnsupportedModelError
from metier.methods.mixlora.config import experts_of
from metier.methods.mixlora.layer import CANNOT_MERGE, MixLoraLayer
from metier.methods.parameter_tuner import ParameterTuner
from metier.models.dense_mlp import DenseMlp, dense_mlp
from metier.models.feed_forward import feed_forward_paths
from metier.models.moe import is_dense
from metier.models.routed import decoder_layer_index
from metier.models.unwrap import bare_model, original_module
from metier.routing.selection import ExpertSelection


class MixLoraModel(ParameterTuner):
    """A dense model with mixtures of LoRA experts. Made by `peft.get_peft_model(model, MixLoraConfig())`.

    Every decoder layer's dense feed-forward block, gated or not. Attention is left as it is, where MixLoRA may have
    plain LoRAs. An MoE model is refused whole, its dense blocks too.

    Paper: MixLoRA, arXiv:2404.15159; MoLoRA, arXiv:2309.05444, which is `top_k = num_experts`.
    """

    prefix = "mixlora_"
    tuner_layer_cls = MixLoraLayer
    cannot_merge = CANNOT_MERGE

    def auxiliary_loss(self) -> Tensor:
        """What a training step adds to its loss so that experts stay balanced: the mean over layers, float32, a scalar.

        Of the last forward pass in training mode, with `router_aux_loss_coef` in it; adapters active together add up. 0
        where no active adapter has a coefficient above 0.

        Raises:
            ConfigError: there was no such pass, or its routers are out of autograd's reach.
        """
        total = torch.zeros(())
        for name in self.active_adapters:
            coefficient = self.peft_config[name].router_aux_loss_coef
            layers = [layer for layer in self._layers() if name in layer.configs]
            if not coefficient:
                continue
            losses = [layer.balance[name].value for layer in layers]
            found = [loss for loss in losses if loss is not None]
            if len(found) < len(losses):
                raise ConfigError(
                    f"auxiliary_loss: adapter '{name}' has been through no forward pass in training mode; call "
                    "model.train(), then the model, then this."
                )
            trained = any(layer.mixlora_router[name].requires_grad for layer in layers)
            if trained and torch.is_grad_enabled() and not all(loss.requires_grad for loss in found):
                raise ConfigError(
                    "auxiliary_loss: the forward pass ran without autograd, as gradient checkpointing with "
                    'use_reentrant=True has it, so the loss could move no router.\nPass {"use_reentrant": False}, or '
                    "set router_aux_loss_coef to 0."
                )
            total = total + coefficient * torch.stack([loss.to(total.device) for loss in found]).mean()
        return total

    def select_experts(self, selection: ExpertSelection | None, adapter_name: str = "default") -> None:
        """From now on train a selection's experts alone, routers resting; or, with None, all experts and the routers.

        Raises:
            SelectionError: it names an expert or a layer that the adapter does not have.
        """
        config = self.peft_config[adapter_name]
        experts = None if selection is None else experts_of(selection)
        layers = [layer for layer in self._layers() if adapter_name in layer.configs]
        _check_experts(experts, [layer.index for layer in layers], config.num_experts)
        config.experts = experts
        for layer in layers:
            BaseTunerLayer.set_requires_grad(layer, adapter_name, adapter_name in self.active_adapters)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if not is_dense(self.model):
            raise UnsupportedModelError(
                f"{type(bare_model(self.model)).__name__}: its feed-forward layers are mixtures of experts already, "
                "and MixLoRA makes mixtures of dense ones.\nChange its experts with expert_lora (ExpertLoraConfig)."
            )
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        # whatever is wrong with a block or a selection is said before anything is replaced
        for raw_path, module in self.model.named_modules():
            if self._check_target_module_exists(peft_config, raw_path):
                self._mlps[raw_path] = dense_mlp(original_module(module), raw_path)
        _check_experts(peft_config.experts, [decoder_layer_index(path) for path in self._mlps], peft_config.num_experts)
        return peft_config

    def _chosen_modules(self, config: PeftConfig) -> list[str]:
        return feed_forward_paths(self.model)

    def _new_layer(self, module: nn.Module, path: str, config: PeftConfig) -> nn.Module:
        return MixLoraLayer(module, path, self._mlps[path])

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's own; while it runs, the blocks that it finds are known."""
        self._mlps: dict[str, DenseMlp] = {}
        super().inject_adapter(*args, **kwargs)
        del self._mlps

    def _layers(self) -> list[MixLoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, MixLoraLayer)]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's own looks for the name at the end of a key alone, and an expert's keys go on behind it."""
        shortened = key.replace(f".mixlora_mixture.{adapter_name}.", ".mixlora_mixture.")
        if shortened != key:
            return shortened
        without: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return without


def _check_experts(experts: dict[int, list[int]] | None, layers: list[int], num_experts: int) -> None:
    for layer, ids in (experts or {}).items():
        if layer not in layers:
            raise SelectionError(
                f"layers.{layer}: the adapter is to train experts {ids}, but has no mixture there; its mixtures are in "
                f"layers {sorted(layers)}.\nLayers count from 0."
            )
        if ids[0] < 0 or ids[-1] >= num_experts:
            raise SelectionError(
                f"layers.{layer}: the adapter is to train experts {ids}, but has num_experts={num_experts} (ids 0 to "
                f"{num_experts - 1}).\nSelect again from this adapter's profile."
            )
