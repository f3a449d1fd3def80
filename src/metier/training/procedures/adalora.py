"""AdaLoRA: after each step the ranks go to where they matter, by a schedule over the whole run."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metier.errors import ConfigError


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
