"""LoRA on selected experts: low-rank changes of the experts that a task uses, and of nothing else."""

from metier.methods.expert_lora.config import ExpertLoraConfig
from metier.methods.expert_lora.layer import LoraExperts
from metier.methods.expert_lora.model import ExpertLoraModel
from metier.methods.expert_lora.peft_layout import export_peft_lora, import_peft_lora
from metier.methods.peft_types import MetierPeftType, register

register(MetierPeftType.EXPERT_LORA, ExpertLoraConfig, ExpertLoraModel)

__all__ = ["ExpertLoraConfig", "ExpertLoraModel", "LoraExperts", "export_peft_lora", "import_peft_lora"]
