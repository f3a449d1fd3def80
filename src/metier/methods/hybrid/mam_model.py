"""The MAM tuner: a prefix in every attention module, a parallel adapter beside every feed-forward block."""

from __future__ import annotations

from metier.methods.hybrid.hybrid_model import HybridModel
from metier.methods.prefix.model import fold_layers


class MamModel(HybridModel):
    """A model with MAM adapters. Made by `peft.get_peft_model(model, MamConfig())`.

    On Mixture-of-Experts models the adapter stands beside the whole MoE block: router, routed and shared experts.
    """

    prefix = "tuned_"

    def fold_prefix(self, adapter_name: str = "default") -> None:
        """As `PrefixModel.fold_prefix`, for adapters with a `prefix_bottleneck`.

        Raises:
            ConfigError: there is no such adapter.
        """
        fold_layers(self.model, self.peft_config, adapter_name)
        self.peft_config[adapter_name].prefix_bottleneck = None
