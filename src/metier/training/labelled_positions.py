"""SFTTrainer whose output layer sees, on a CPU, only the positions that have a label."""

# B rows, T tokens, L positions with a label, D hidden_size

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from trl import SFTTrainer

from metier.data.encode import IGNORED


class LabelledPositionsTrainer(SFTTrainer):
    """TRL's trainer, faster where prompts and padding have no loss.

    TRL leaves positions without a label out of the output layer where it has Triton, and computes them elsewhere. On a
    CPU that is a third of a step where the model is small or its vocabulary large. Here the layers' output is cut down
    to the labelled positions before the output layer reads it, and their labels are handed over as already shifted.
    Losses and gradients are the same up to rounding.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels_BT: Tensor = inputs["labels"][:, 1:]
        is_labelled_BT = labels_BT != IGNORED
        # outputs are wanted with the logits of all positions, and without a label there is nothing to keep
        if return_outputs or labels_BT.device.type != "cpu" or not is_labelled_BT.any():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def keep_labelled(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden_1LD = output.last_hidden_state[:, :-1][is_labelled_BT].unsqueeze(0)
            output.last_hidden_state = hidden_1LD
            return output

        hook = self._layers().register_forward_hook(keep_labelled)
        try:
            shifted = {**inputs, "shift_labels": labels_BT[is_labelled_BT].unsqueeze(0)}
            return super().compute_loss(model, shifted, return_outputs, num_items_in_batch)
        finally:
            hook.remove()

    def _layers(self) -> nn.Module:
        """All of the model before its output layer, as TRL finds it."""
        model = self.accelerator.unwrap_model(self.model)
        layers: nn.Module = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
        return layers
