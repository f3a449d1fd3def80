"""On a CPU, what parts of a layer have freed goes back to the system before the process grows past its peak.

glibc keeps freed blocks below 32 MB in its heap. Between them lie small ones that stay for the backward pass, so that
many of the holes fit nothing that comes later, and a process grows to 1.7 times of what its tensors take. Giving back
now and then costs a few page faults; mapping every block by itself, the other way, costs 12 to 38% of a step:
benchmarks/results/heap.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metier.memory.allocator import give_back_what_is_free, is_left_alone
from metier.memory.heap_policy import HeapPolicy
from metier.memory.process_memory import ProcessMemory
from metier.models.layers import layer_stacks


class GiveBack(TrainerCallback):
    """Looks after each part of a layer forward, before it backward and before the optimizer's step, and gives back if
    the process might else grow past its peak (`HeapPolicy`)."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._policy = HeapPolicy()
        self._memory: ProcessMemory | None = None
        """Open while it looks."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        if args.device.type != "cpu" or is_left_alone() or not ProcessMemory.is_known():
            return
        self._memory = ProcessMemory()
        for stack in layer_stacks(model):
            parts = [part for part in stack.modules() if next(part.parameters(), None) is not None]
            self._hooks += [part.register_forward_hook(self._after) for part in parts]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._policy.begin_step()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._policy.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._memory is not None:
            self._look()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # forward, an evaluation comes to the same places
        self._policy.begin_step()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, _part: nn.Module, _args: Any, out: Any) -> None:
        self._look()
        hidden_BTD = out[0] if isinstance(out, tuple) else out
        if isinstance(hidden_BTD, Tensor) and hidden_BTD.requires_grad:
            hidden_BTD.register_hook(lambda _gradient: self._look())

    def _look(self) -> None:
        assert self._memory is not None, "it looks between the beginning and the end of training alone"
        if self._policy.should_give_back(*self._memory.held_and_peak_bytes()):
            give_back_what_is_free()
            self._policy.gave_back(self._memory.held_and_peak_bytes()[0])
