"""What a run tells while it runs: a line of metrics.jsonl a logged step, and a progress bar or plain lines."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from metier.distributed.ranks import largest, ranks_here, total
from metier.memory.process_memory import ProcessMemory

_CLEAR = Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Begin a new peak, so that several runs in one process have one each; where the host has no way to, it goes on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if os.access(_CLEAR, os.W_OK):
        _CLEAR.write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """Most memory held since the last reset: of the accelerator where there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if ProcessMemory.is_known():
        with closing(ProcessMemory()) as memory:
            return memory.held_and_peak_bytes()[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class CountTokens(TrainerCallback, ExportableState):
    """Puts `num_tokens` into what is logged: the records' tokens that the model was trained on, padding left out.

    Those before the checkpoint from which a run goes on count too; checkpoints keep the number. TRL's own is right for
    padded batches alone, and begins anew. This callback stands before those that use the number.
    """

    def __init__(self, *, num_passes: int = 1) -> None:
        self._num_counted, self._num_passes = 0, num_passes
        self._num_before, self._num_at_checkpoint = 0, 0
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        # a state that begins holds what this callback said when it was made, which may be what it trained before
        self._num_before = self._num_at_checkpoint = num_tokens_before(state)
        self._num_counted = 0
        # the trainer writes into what checkpoints of older runs do not have
        state.stateful_callbacks[_COUNT] = self.state()
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"num_passes": self._num_passes}, "attributes": {"num_tokens": self._num_at_checkpoint}}

    def _num_tokens(self) -> int:
        """Each once, however many passes there are over a batch; all processes must ask."""
        return self._num_before + int(total(self._num_counted // self._num_passes))

    def _count(self, model: nn.Module, _: tuple[Any, ...], batch: dict[str, Any]) -> None:
        if model.training:
            self._num_counted += num_record_tokens(batch.get("attention_mask"), batch.get("position_ids"))
            if "decoder_attention_mask" in batch:
                self._num_counted += int(batch["decoder_attention_mask"].sum())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None and ("num_tokens" in logs or "loss" in logs):
            logs["num_tokens"] = self._num_tokens()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save or not ranks_here().are_several:  # a run that ends by an error is saved, where it is one
            self._num_at_checkpoint = self._num_tokens()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def num_tokens_before(state: TrainerState) -> int:
    """Tokens that a run had been trained on at the checkpoint from which it goes on; 0 where it begins."""
    if not state.global_step:
        return 0
    return int(state.stateful_callbacks.get(_COUNT, {}).get("attributes", {}).get("num_tokens", 0))


_COUNT = CountTokens.__name__
"""As the trainer names what it keeps of a callback."""


def num_record_tokens(attention_mask_BT: Tensor | None, position_ids_RT: Tensor | None) -> int:
    """Tokens of a batch that belong to a record: by the mask of `Collator`, or the positions of `PaddingFreeCollator`.

    There every token of a row's padding has position 0, as has the first of each record; padding is followed by 0 or
    by nothing, a record's first token by 1.
    """
    if attention_mask_BT is not None:
        return int(attention_mask_BT.sum())
    assert position_ids_RT is not None, "a batch of metier has a mask or positions"
    following_RT = nn.functional.pad(position_ids_RT[:, 1:], (0, 1))
    return int(((position_ids_RT > 0) | (following_RT > 0)).sum())


class StepTimes(TrainerCallback):
    """Reads the clock at both ends of every step of the optimizer; evaluations, saving and logging are between them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    @property
    def usual(self) -> float | None:
        """Of a step, the median; the first one makes what later ones use again. None where there was no step."""
        return median(self.seconds[1:] or self.seconds) if self.seconds else None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


class MetricsLog(TrainerCallback):
    """Writes metrics.jsonl. A resumed run takes back the lines behind its checkpoint, so each step stands once.

    Args:
        path: the file.
        times: of the steps; it stands before this callback.
        foreseen: what was predicted of what is logged; it stands beside it in every line.
    """

    def __init__(self, path: Path, times: StepTimes, foreseen: Mapping[str, float | str]) -> None:
        self.path, self.times = path, times
        self.foreseen = {
            f"foreseen_{name}": foreseen[name] for name in ("step_seconds", "peak_memory_bytes") if name in foreseen
        }
        self._started, self._num_logged, self._num_before = 0.0, 0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started, self._num_before = time.monotonic(), num_tokens_before(state)
        if not ranks_here().is_main:
            return
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that a kill cut off
                if row["step"] <= state.global_step:
                    kept.append(line + "\n")
        self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        seconds = time.monotonic() - self._started
        row: dict[str, float | str] = {"step": state.global_step, **(logs or {})}
        if logs and "num_tokens" in logs and "loss" in logs and seconds > 0:
            row["tokens_per_second"] = round((logs["num_tokens"] - self._num_before) / seconds, 1)
        since = self.times.seconds[self._num_logged :]
        if since:
            row["step_seconds"] = round(fmean(since), 4)
            self._num_logged += len(since)
        peak = int(largest(peak_memory_bytes()))
        row |= {"seconds": round(seconds, 3), "peak_memory_bytes": peak, **self.foreseen}
        if not ranks_here().is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class ShowProgress(TrainerCallback):
    """A progress bar with loss, tokens/s, peak memory and time left; without a terminal, one line a logged step."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._first_step, self._num_before = 0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        self._num_before = num_tokens_before(state)
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self._progress = Progress(*columns, TimeRemainingColumn(), console=self.console)
        self._task = self._progress.add_task(
            self.name, total=state.max_steps, completed=state.global_step, facts="starting"
        )
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = time.monotonic() - self._started
        facts = f"loss {float(logs['loss']):.3f}"
        if "num_tokens" in logs:
            facts += f", {(logs['num_tokens'] - self._num_before) / max(seconds, 1e-9):,.0f} tokens/s"
        facts += f", peak {peak_memory_bytes() / 2**30:.2f} GB"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, facts=facts)
            return
        done = state.global_step - self._first_step
        left = seconds / max(1, done) * (state.max_steps - state.global_step)
        self.console.print(f"{self.name}: step {state.global_step}/{state.max_steps}, {facts}, {left:.0f} s left")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
