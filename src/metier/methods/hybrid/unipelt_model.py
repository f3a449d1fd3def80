"""The UniPELT tuner: in every layer a gated prefix, a gated LoRA and a gated serial adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftConfig
from torch import nn

from metier.errors import ConfigError
from metier.methods.hybrid.gated_lora import GatedLoraLayer
from metier.methods.hybrid.hybrid_model import HybridModel
from metier.models.attention import calls_interface, query_value_names
from metier.models.unwrap import original_module


class UnipeltModel(HybridModel):
    """A model with UniPELT adapters. Made by `peft.get_peft_model(model, UnipeltConfig())`.

    The LoRA stands on the projections of queries and values. Where attention is latent (MLA: DeepSeek V2 and V3), on
    the last projection of queries, `q_proj` or `q_b_proj`, and on `kv_b_proj`, which makes keys as well. The serial
    adapter stands after the feed-forward block, on Mixture-of-Experts models after the whole MoE block.
    """

    prefix = "tuned_"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own; the saved configuration names the blocks, whose attention modules bring their LoRA along."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        inner = {layer.path for _, _, layer in self._lora_layers()}
        config = self.peft_config[adapter_name]
        config.target_modules = [path for path in config.target_modules if path not in inner]

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if calls_interface(target):
            self._add_lora(original_module(target), adapter_name, current_key, peft_config)
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)

    def _add_lora(self, attention: nn.Module, adapter_name: str, path: str, config: PeftConfig) -> None:
        for name in config.lora_targets or query_value_names(attention, path):
            projection = getattr(attention, name, None)
            if not isinstance(projection, nn.Module):
                children = ", ".join(child for child, _ in attention.named_children())
                raise ConfigError(f"{path}: lora_targets: got {name!r}, expected some of its children: {children}.")
            layer = (
                projection if isinstance(projection, GatedLoraLayer) else GatedLoraLayer(projection, f"{path}.{name}")
            )
            layer.update_layer(adapter_name, config.lora_r)
            setattr(attention, name, layer)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        # PEFT takes away the outermost layers alone
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        for attention, name, layer in list(self._lora_layers()):
            setattr(attention, name, layer.base_layer)
        return unloaded

    def _lora_layers(self) -> Iterator[tuple[nn.Module, str, GatedLoraLayer]]:
        """Each with the module that it is a child of, and its name there."""
        for module in self.model.modules():
            for name, child in module.named_children():
                if isinstance(child, GatedLoraLayer):
                    yield module, name, child
