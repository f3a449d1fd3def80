"""The ESFT tuner: put `EsftExperts` where a selection says, through PEFT's own machinery."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn

from metier.methods.esft.config import EsftConfig
from metier.methods.esft.layer import EsftExperts
from metier.methods.expert_tuner import ExpertTuner
from metier.models.moe import MoELayer


class EsftModel(ExpertTuner):
    """A model with ESFT adapters. Made by `peft.get_peft_model(model, EsftConfig(experts={1: [8, 26]}))`.

    A batch may mix adapters: pass `adapter_names=["law", "__base__", …]`, one a row, to the PEFT model's forward.
    """

    prefix = "esft_"
    tuner_layer_cls = EsftExperts

    def _new_layer(self, view: MoELayer) -> nn.Module:
        return EsftExperts(view)

    def _update_layer(self, layer: nn.Module, adapter_name: str, config: PeftConfig) -> None:
        assert isinstance(layer, EsftExperts), "made by _new_layer"
        assert isinstance(config, EsftConfig), "registered with this tuner"
        assert config.experts is not None, "EsftConfig refuses to be made without experts"
        layer.update_layer(adapter_name, config.experts[layer.layer_index])
