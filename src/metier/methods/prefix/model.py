"""The prefix tuner: put `PrefixLayer` around attention modules, through PEFT's own machinery."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft import PeftConfig
from torch import nn

from metier.errors import ConfigError
from metier.methods.parameter_tuner import ParameterTuner
from metier.methods.prefix.layer import CANNOT_MERGE, PrefixLayer
from metier.models.attention import interface_paths
from metier.models.attention_interface import check_implementation
from metier.models.feed_forward import hidden_size_of
from metier.models.unwrap import original_module


class PrefixModel(ParameterTuner):
    """A model with prefixes. Made by `peft.get_peft_model(model, PrefixConfig(num_prefix_tokens=16))`.

    It covers every attention module that calls transformers' attention interface, latent (MLA) and sliding-window
    attention included, with sdpa or eager attention. In models that mix kinds of attention, linear attention and Mamba
    mixers get no prefix: they have no keys.
    """

    prefix = "tuned_prefix_"
    tuner_layer_cls = PrefixLayer
    cannot_merge = CANNOT_MERGE

    def fold_prefix(self, adapter_name: str = "default") -> None:
        """Turn a prefix that a network makes into one that stands for itself and computes the same; before serving.

        Saving does not do this by itself: a run that is resumed from its checkpoint trains the network further.

        Raises:
            ConfigError: there is no such adapter.
        """
        fold_layers(self.model, self.peft_config, adapter_name)
        self.peft_config[adapter_name].bottleneck = None

    def _chosen_modules(self, config: PeftConfig) -> list[str]:
        return interface_paths(self.model)

    def _new_layer(self, module: nn.Module, path: str, config: PeftConfig) -> nn.Module:
        return new_prefix_layer(self.model, module, path)


def new_prefix_layer(model: nn.Module, module: nn.Module, path: str) -> PrefixLayer:
    """A layer around an attention module, without a prefix yet.

    Raises:
        ConfigError: the model's attention implementation has no mask that a prefix could be in.
        UnsupportedModelError: the sizes of the module's keys and values are unknown.
    """
    config: Any = getattr(original_module(module), "config", None)
    check_implementation(getattr(config, "_attn_implementation", None), path)
    return PrefixLayer(module, path, hidden_size_of(model))


def fold_layers(model: nn.Module, known: Collection[str], adapter_name: str) -> None:
    """Fold one of the `known` adapters in every layer of `model` that has a prefix of it.

    Raises:
        ConfigError: there is no such adapter.
    """
    if adapter_name not in known:
        raise ConfigError(f"fold_prefix: got no adapter {adapter_name!r}, expected one of {', '.join(known)}.")
    for module in model.modules():
        if isinstance(module, PrefixLayer):
            module.fold(adapter_name)
