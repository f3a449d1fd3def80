"""What stores do in a step, in metrics.jsonl: a sparse adapter's rows, and a base's frozen weights."""

from __future__ import annotations

import json
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metier.distributed.ranks import summed
from metier.memory.frozen_model import frozen_weights
from metier.memory.frozen_store import FrozenStore
from metier.memory.meter import Meter, of_a_step
from metier.memory.row_store import RowStore
from metier.methods.meft import MeftLayer


class CountRows(TrainerCallback):
    """Puts into what is logged how a sparse adapter's stores were used since the last line, the mean of a step, and
    when training is over, into a file how many tokens each Key-Expert had, in all processes together.

    This callback stands before those that use the numbers.

    Args:
        path: of the file; None to write none, as all processes of a run but one do.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._stores: list[RowStore] = []
        self._meters: list[Meter] = []
        """Of each store, of the steps since the last line."""
        self._names: list[str] = []
        self._tokens: list[list[int]] = []
        """Of each store, by its Key-Experts, since training began or was resumed."""
        self._step = self._first_step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        layers = [(path, module) for path, module in model.named_modules() if isinstance(module, MeftLayer)]
        named = [(path, store) for path, layer in layers for store in layer.stores.values()]
        self._names, self._stores = [path for path, _ in named], [store for _, store in named]
        self._tokens = [[0] * store.num_blocks for store in self._stores]
        self._step = self._first_step = state.global_step
        self._meters = [Meter(store.num_blocks, store.meter.block_bytes) for store in self._stores]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # what an evaluation or a checkpoint has moved is no part of a step
        for store in self._stores:
            store.begin_step()
            store.meter.take()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for store, meter in zip(self._stores, self._meters, strict=True):
            meter.add(store.meter.take())

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
        logs |= of_a_step(self._take(), state.global_step - self._step)
        self._step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._take()
        counted: list[list[int]] = [summed(torch.tensor(counts)).tolist() for counts in self._tokens]
        if self._path is not None:
            tokens = dict(zip(self._names, counted, strict=True))
            content = {"num_steps": state.global_step - self._first_step, "tokens": tokens}
            self._path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def _take(self) -> list[Meter]:
        meters = [meter.take() for meter in self._meters]
        for counts, meter in zip(self._tokens, meters, strict=True):
            counts[:] = map(add, counts, meter.tokens_by_block)
        return meters


class CountFrozen(TrainerCallback):
    """Puts into what is logged what was read of a base's frozen weights since the last line, the mean of a step.

    This callback stands before those that use the numbers.
    """

    def __init__(self) -> None:
        self._stores: list[FrozenStore] = []
        self._step = 0
        self._bytes_from_disk, self._stall_seconds = 0, 0.0
        """Of the steps since the last line."""

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

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # what an evaluation has read is no part of a step
        for store in self._stores:
            store.meter.take()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        meters = [store.meter.take() for store in self._stores]
        self._bytes_from_disk += sum(meter.bytes_from_disk for meter in meters)
        self._stall_seconds += sum(meter.stall_seconds for meter in meters)

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
        num_steps = state.global_step - self._step
        logs["base_bytes_from_disk"] = self._bytes_from_disk / num_steps
        logs["base_stall_seconds"] = self._stall_seconds / num_steps
        self._bytes_from_disk, self._stall_seconds, self._step = 0, 0.0, state.global_step
