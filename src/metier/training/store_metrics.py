"""What stores do in a step, in metrics.jsonl: a sparse adapter's rows, and a base's frozen weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metier.memory.frozen_model import frozen_weights
from metier.memory.frozen_store import FrozenStore
from metier.memory.meter import of_a_step
from metier.memory.row_store import RowStore
from metier.methods.meft import MeftLayer


class CountRows(TrainerCallback):
    """Puts into what is logged how a sparse adapter's stores were used since the last line, the mean of a step.

    This callback stands before those that use the numbers.
    """

    def __init__(self) -> None:
        self._stores: list[RowStore] = []
        self._step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        layers = [module for module in model.modules() if isinstance(module, MeftLayer)]
        self._stores = [store for layer in layers for store in layer.stores.values()]
        self._step = state.global_step
        for store in self._stores:
            store.meter.take()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs or state.global_step == self._step:
            return
        logs |= of_a_step([store.meter.take() for store in self._stores], state.global_step - self._step)
        self._step = state.global_step


class CountFrozen(TrainerCallback):
    """Puts into what is logged what was read of a base's frozen weights since the last line, the mean of a step.

    This callback stands before those that use the numbers.
    """

    def __init__(self) -> None:
        self._stores: list[FrozenStore] = []
        self._step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        self._stores = [weight.store for weight in frozen_weights(model)]
        self._step = state.global_step
        for store in self._stores:
            store.meter.take()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs or state.global_step == self._step:
            return
        meters, num_steps = [store.meter.take() for store in self._stores], state.global_step - self._step
        logs["base_bytes_from_disk"] = sum(meter.bytes_from_disk for meter in meters) / num_steps
        logs["base_stall_seconds"] = sum(meter.stall_seconds for meter in meters) / num_steps
        self._step = state.global_step
