"""The tuner of LoRA on selected experts: put `LoraExperts` where a selection says, through PEFT's own machinery."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn

from metier.methods.expert_lora.config import ExpertLoraConfig
from metier.methods.expert_lora.layer import LoraExperts
from metier.methods.expert_tuner import ExpertTuner
from metier.models.moe import MoELayer


class ExpertLoraModel(ExpertTuner):
    """A model with LoRAs on experts. Made by `peft.get_peft_model(model, ExpertLoraConfig(experts={1: [8, 26]}))`.

    A batch may mix adapters: pass `adapter_names=["law", "__base__", …]`, one a row, to the PEFT model's forward.
    """

    prefix = "expert_lora_"
    tuner_layer_cls = LoraExperts

    def _new_layer(self, view: MoELayer) -> nn.Module:
        return LoraExperts(view)

    def _update_layer(self, layer: nn.Module, adapter_name: str, config: PeftConfig) -> None:
        assert isinstance(layer, LoraExperts), "made by _new_layer"
        assert isinstance(config, ExpertLoraConfig), "registered with this tuner"
        layer.update_layer(adapter_name, config)
