"""A mixture of LoRA experts in dense blocks (MixLoRA, arXiv:2404.15159; MoLoRA, arXiv:2309.05444)."""

from metier.methods.mixlora.config import MixLoraConfig
from metier.methods.mixlora.layer import MixLoraLayer
from metier.methods.mixlora.model import MixLoraModel
from metier.methods.peft_types import MetierPeftType, register

register(MetierPeftType.MIXLORA, MixLoraConfig, MixLoraModel)

__all__ = ["MixLoraConfig", "MixLoraLayer", "MixLoraModel"]
