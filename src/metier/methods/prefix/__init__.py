"""Prefix tuning (arXiv:2101.00190) inside attention: keys and values of no token, for every query of a layer to see."""

from metier.methods.peft_types import MetierPeftType, register
from metier.methods.prefix.config import PrefixConfig
from metier.methods.prefix.layer import PrefixLayer
from metier.methods.prefix.model import PrefixModel

register(MetierPeftType.METIER_PREFIX, PrefixConfig, PrefixModel)

__all__ = ["PrefixConfig", "PrefixLayer", "PrefixModel"]
