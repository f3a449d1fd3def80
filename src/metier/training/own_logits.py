"""The loss of a model's own logits, for families that do more behind their layers than TRL's output layer knows.

TRL multiplies what the layers give by the output layer's weights, scales and caps it as most families do, and never
runs the rest of the model's own forward pass. Where that rest is another one, training would be on other logits than
those that the model answers with.
"""

# B rows, T tokens, V vocabulary

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer

from metier.data.pairs import token_mean_loss
from metier.models.unwrap import text_config_of

_BEHIND_THE_LAYERS = ("logits_mup_width_multiplier", "unpadded_vocab_size", "logits_soft_cap", "output_logit_soft_cap")
"""Of configurations: Inkling divides hidden states and leaves padding out of the vocabulary; RecurrentGemma and xLSTM
cap logits under names of their own. (TRL 1.16 knows `final_logit_softcapping` and scales.)"""


def has_plain_head(model: nn.Module) -> bool:
    """Whether TRL's output layer gives the model's own logits."""
    text_config = text_config_of(model)
    return all(getattr(text_config, name, None) is None for name in _BEHIND_THE_LAYERS)


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
        outputs = model(**given, use_cache=False)
        # virtual tokens stand before the record's
        logits_BTV = outputs.logits[:, -labels_BT.shape[1] :]
        loss = token_mean_loss(CausalLMOutput(logits=logits_BTV[:, :-1]), labels_BT[:, 1:], num_items_in_batch)
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * trainer.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
