"""How many positions of a KV cache an adapter takes for itself."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from metier.methods.peft_types import MetierPeftType


def num_virtual_tokens(model: nn.Module) -> int | None:
    """Of every sequence, in every layer; None where a network beside the base keeps a cache of its own."""
    if not isinstance(model, PeftModel):
        return 0
    adapter = model.peft_config[model.active_adapter]
    if adapter.peft_type in ("LADDER", "SHADOW"):
        return None
    # metier's own prefixes stand in the attention, once for all sequences
    return 0 if adapter.peft_type in set(MetierPeftType) else getattr(adapter, "num_virtual_tokens", None) or 0
