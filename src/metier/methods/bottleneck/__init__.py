"""Bottleneck adapters (arXiv:1902.00751, 2005.00247, 2110.04366): two thin layers after a block or beside it."""

from metier.methods.bottleneck.config import BottleneckConfig
from metier.methods.bottleneck.layer import BottleneckLayer
from metier.methods.bottleneck.model import BottleneckModel
from metier.methods.peft_types import MetierPeftType, register

register(MetierPeftType.BOTTLENECK, BottleneckConfig, BottleneckModel)

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
