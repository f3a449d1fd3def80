"""ESFT, expert-specialized fine-tuning (arXiv:2407.01906): train the selected routed experts, nothing else."""

from metier.methods.esft.config import EsftConfig
from metier.methods.esft.layer import EsftExperts
from metier.methods.esft.model import EsftModel
from metier.methods.peft_types import MetierPeftType, register

register(MetierPeftType.ESFT, EsftConfig, EsftModel)

__all__ = ["EsftConfig", "EsftExperts", "EsftModel"]
