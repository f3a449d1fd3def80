"""What each process holds of a sharded model's weights: measured, for people and for plan.json."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metier.distributed.ranks import largest
from metier.planning.spelling import size


class MeasureShards(TrainerCallback):
    """Adds up the memory behind a model's parameters when training begins."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.held_bytes, self.whole_bytes = 0, 0
        """Of the process that holds most, and of a model that is not parted."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None, "the trainer passes its model to every callback"
        parameters = list(model.parameters())
        self.whole_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        self.held_bytes = int(largest(sum(_stored_bytes(parameter) for parameter in parameters)))
        self.console.print(
            f"Each process holds {size(self.held_bytes)} of {size(self.whole_bytes)} of weights "
            f"({self.held_bytes / self.whole_bytes:.0%})",
            highlight=False,
        )

    @property
    def measured(self) -> dict[str, float]:
        """For plan.json."""
        return {"weight_bytes_per_process": self.held_bytes, "weight_bytes": self.whole_bytes}


def _stored_bytes(parameter: Tensor) -> int:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.untyped_storage().nbytes()
