"""Hybrids: adapters that are several methods at once, in one configuration and one file."""

from metier.methods.hybrid.gated_lora import GatedLoraLayer
from metier.methods.hybrid.mam_config import MamConfig
from metier.methods.hybrid.mam_model import MamModel
from metier.methods.hybrid.unipelt_config import UnipeltConfig
from metier.methods.hybrid.unipelt_model import UnipeltModel
from metier.methods.peft_types import MetierPeftType, register

register(MetierPeftType.MAM, MamConfig, MamModel)
register(MetierPeftType.UNIPELT, UnipeltConfig, UnipeltModel)

__all__ = ["GatedLoraLayer", "MamConfig", "MamModel", "UnipeltConfig", "UnipeltModel"]
