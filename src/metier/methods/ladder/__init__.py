"""Ladder side tuning (arXiv:2206.06522): a small network beside a frozen decoder, through which nothing goes back."""

from metier.methods.ladder.config import LadderConfig
from metier.methods.ladder.layer import LadderLayer, LadderTop
from metier.methods.ladder.model import LadderModel
from metier.methods.peft_types import MetierPeftType, register

register(MetierPeftType.LADDER, LadderConfig, LadderModel)

__all__ = ["LadderConfig", "LadderLayer", "LadderModel", "LadderTop"]
