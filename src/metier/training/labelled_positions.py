"""On a CPU the output layer sees only the positions that have a label.

TRL leaves the others out where it has Triton, and computes them elsewhere. That is half of a step and more where
prompts are long, or where the model is small beside its vocabulary.
"""

# B rows, T tokens

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from trl import SFTTrainer

from metier.data.encode import IGNORED
from metier.models.labelled_output import labelled_output


def keep_to_labelled_positions(trainer: SFTTrainer) -> None:
    """Have the trainer cut down what the layers give to the labelled positions before the output layer reads it.

    Their labels are handed over as already shifted. Losses, gradients and metrics are the same up to rounding. A batch
    on an accelerator, one without a label, and one whose logits are asked for go TRL's way.
    """
    plain = trainer.compute_loss

    def compute_loss(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels_BT: Tensor = inputs["labels"][:, 1:]
        is_labelled_BT = labels_BT != IGNORED
        if return_outputs or labels_BT.device.type != "cpu" or not is_labelled_BT.any():
            return plain(model, inputs, return_outputs, num_items_in_batch)

        hook = layers_of(trainer).register_forward_hook(labelled_output(is_labelled_BT))
        try:
            shifted = {**inputs, "shift_labels": labels_BT[is_labelled_BT].unsqueeze(0)}
            return plain(model, shifted, return_outputs, num_items_in_batch)
        finally:
            hook.remove()

    trainer.compute_loss = compute_loss


def layers_of(trainer: SFTTrainer) -> nn.Module:
    """All of the trainer's model before its output layer, as TRL finds it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    layers: nn.Module = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    return layers
