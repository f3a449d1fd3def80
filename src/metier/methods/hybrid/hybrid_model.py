"""A tuner of a prefix in attention and a bottleneck adapter at feed-forward blocks, made of their own layers."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn

from metier.methods.block_layer import BlockLayer
from metier.methods.bottleneck.layer import BottleneckLayer
from metier.methods.parameter_tuner import ParameterTuner
from metier.methods.prefix.model import new_prefix_layer
from metier.models.attention import calls_interface, interface_paths
from metier.models.feed_forward import feed_forward_paths, hidden_size_of


class HybridModel(ParameterTuner):
    """A model with such adapters; abstract.

    Its configuration has `prefix_part` and `bottleneck_part`, the configurations of the two methods. A module gets a
    prefix if it calls transformers' attention interface, any other the bottleneck adapter. What the two tuners say of
    the models that they cover holds here.
    """

    tuner_layer_cls = BlockLayer
    cannot_merge = (
        "its prefix and its bottleneck adapters are no change of the base's weights, so it cannot be merged. Serve it "
        "beside its base."
    )

    def _chosen_modules(self, config: PeftConfig) -> list[str]:
        return [*interface_paths(self.model), *feed_forward_paths(self.model)]

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
        part = peft_config.prefix_part if calls_interface(target) else peft_config.bottleneck_part
        super()._create_and_replace(part, adapter_name, target, target_name, parent, current_key, parameter_name)

    def _new_layer(self, module: nn.Module, path: str, config: PeftConfig) -> nn.Module:
        if calls_interface(module):
            return new_prefix_layer(self.model, module, path)
        return BottleneckLayer(module, path, hidden_size_of(self.model))
