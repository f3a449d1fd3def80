"""AdaLoRA: after each step the ranks go to where they matter, by a schedule over the whole run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metier.errors import ConfigError


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


class AllocateRanks(TrainerCallback):
    """Calls PEFT's `update_and_allocate` where it wants to be called: after a step, before its gradients go."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        tuner: Any = model.base_model
        config = tuner.peft_config[tuner.trainable_adapter_name]
        if config.tinit + config.tfinal >= state.max_steps:
            raise ConfigError(
                f"adalora: tinit and tfinal are {config.tinit} and {config.tfinal}, but the run has {state.max_steps} "
                "steps, so that no rank would be allotted anew. Lower them."
            )
        # only now it is known
        tuner.peft_config[tuner.trainable_adapter_name].total_step = state.max_steps
        tuner.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        tuner: Any = model.base_model
        tuner.update_and_allocate(state.global_step)
