"""The bottleneck tuner: put `BottleneckLayer` around blocks, through PEFT's own machinery; and drop lower layers'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from metier.errors import ConfigError
from metier.methods.bottleneck.layer import CANNOT_MERGE, BottleneckLayer
from metier.methods.parameter_tuner import ParameterTuner
from metier.models.attention import attention_paths
from metier.models.feed_forward import feed_forward_paths, hidden_size_of, num_layers_of
from metier.models.layers import index_of_owner


class BottleneckModel(ParameterTuner):
    """A model with bottleneck adapters. Made by `peft.get_peft_model(model, BottleneckConfig(r=64))`.

    On Mixture-of-Experts models the feed-forward block is the whole MoE block: one adapter for the sum of routed and
    shared experts, in dense layers for the MLP. Attention is self-attention, cross-attention and linear attention;
    Mamba mixers get no adapter.
    """

    prefix = "tuned_bottleneck_"
    tuner_layer_cls = BottleneckLayer
    cannot_merge = CANNOT_MERGE

    def drop_layers(self, num_layers: int) -> None:
        """Answer without the adapters of the first `num_layers` layers of the model, until called again; 0 has all.

        Raises:
            ConfigError: fewer than 0 or more layers than the model has.

        Paper: AdapterDrop, arXiv:2010.11918.
        """
        total = num_layers_of(self.model)
        if not 0 <= num_layers <= total:
            raise ConfigError(f"drop_layers: got {num_layers}, expected 0 to {total}, the layers of the model.")
        for layer in self._layers():
            layer.num_dropped_layers = num_layers

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around each forward pass of a `PeftModel`; in training, a number of lower layers is drawn that rest in it."""
        for name in self.active_adapters if self.training else ():
            most = self.peft_config[name].random_drop_layers
            drawn = int(torch.randint(most + 1, ())) if most else 0
            for layer in self._layers():
                # kept on the layers, so that what is computed again for the backward pass goes without the same ones
                layer.dropped_in_step[name] = drawn
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _layers(self) -> list[BottleneckLayer]:
        return [module for module in self.model.modules() if isinstance(module, BottleneckLayer)]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        total = num_layers_of(self.model)
        for name in ("drop_layers", "random_drop_layers"):
            if getattr(peft_config, name) >= total:
                raise ConfigError(
                    f"{type(peft_config).__name__}: {name} must be less than {total}, the layers of the model, so that "
                    f"some adapter is left; got {getattr(peft_config, name)}."
                )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _chosen_modules(self, config: PeftConfig) -> list[str]:
        paths = feed_forward_paths(self.model)
        return [*attention_paths(self.model), *paths] if config.variant == "houlsby" else paths

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        """PEFT's own, without the layers that get no adapter."""
        if index_of_owner(key) < peft_config.drop_layers:
            return False
        return ParameterTuner._check_target_module_exists(peft_config, key)

    def _new_layer(self, module: nn.Module, path: str, config: PeftConfig) -> nn.Module:
        return BottleneckLayer(module, path, hidden_size_of(self.model))
