"""What methods add to the loss of a batch: that routers share tokens out, that directions are orthonormal, and such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metier.catalogue.tree import method_of

Term = Callable[[Any], Tensor]
"""Of an adapter's tuner, after a forward pass in training mode: a scalar."""


def added_term(method: str) -> Term | None:
    """Of the method of that name; None where it adds nothing."""
    return _TERMS.get(method_of(method).optimizer or "")


def orthogonality(tuner: Any) -> Tensor:
    """How far the singular directions are from orthonormal, times the method's weight; PEFT adds it to another loss.

    Paper: AdaLoRA, arXiv:2303.10512, equation 4, the mean over matrices, as PEFT has it.
    """
    adapter = tuner.trainable_adapter_name
    distances = []
    for name, parameter in tuner.model.named_parameters():
        if adapter in name and ("lora_A" in name or "lora_B" in name):
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    weight: float = tuner.peft_config[adapter].orth_reg_weight
    return weight * torch.stack(distances).mean()


_TERMS: dict[str, Term] = {
    "adalora": orthogonality,
    "auxiliary_loss": lambda tuner: tuner.auxiliary_loss(),
    "diff_pruning": lambda tuner: tuner.penalty(),
}
