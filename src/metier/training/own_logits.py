"""The loss of a model's own logits, for families that do more behind their layers than TRL's output layer knows."""

# B rows, T tokens, V vocabulary

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl import SFTTrainer

from metier.data.pairs import mean_cross_entropy
from metier.models.own_logits import own_logits


def train_on_own_logits(trainer: SFTTrainer) -> None:
    """Have the trainer take the cross entropy of the model's own logits, the mean over the step's labelled tokens."""

    def compute_loss(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels_BT: Tensor = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        outputs, logits_BTV = own_logits(model, given, labels_BT.shape[1])
        loss = mean_cross_entropy(logits_BTV[:, :-1], labels_BT[:, 1:], num_items_in_batch)
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * trainer.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
