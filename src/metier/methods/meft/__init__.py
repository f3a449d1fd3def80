"""MEFT (arXiv:2406.04984): a wide adapter beside every feed-forward block, of which each token uses a few rows."""

from metier.methods.meft.config import MeftConfig
from metier.methods.meft.layer import MeftLayer
from metier.methods.meft.model import MeftModel
from metier.methods.peft_types import MetierPeftType, register

register(MetierPeftType.MEFT, MeftConfig, MeftModel)

__all__ = ["MeftConfig", "MeftLayer", "MeftModel"]
