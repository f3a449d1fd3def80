"""Whether a model does more behind its layers than multiply by its output layer's weights, and what it answers with.

TRL multiplies what the layers give by the output layer's weights, scales and caps it as most families do, and never
runs the rest of the model's own forward pass. Where that rest is another one, training would be on other logits than
those that the model answers with.
"""

# B rows, T tokens, V vocabulary

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor, nn

from metier.models.unwrap import bare_model, text_config_of

_BEHIND_THE_LAYERS = ("logits_mup_width_multiplier", "unpadded_vocab_size", "logits_soft_cap", "output_logit_soft_cap")
"""Of configurations: Inkling divides hidden states and leaves padding out of the vocabulary; RecurrentGemma and xLSTM
cap logits under names of their own."""
_KNOWN_TO_TRL = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""What TRL 1.16 does to logits where the text's configuration says so."""


def has_plain_head(model: nn.Module) -> bool:
    """Whether TRL's output layer gives the model's own logits: the model is its layers and one matrix behind them.

    Others do more there (BERT and its kin transform once more), or less (some that read pictures do not scale as their
    part for text would), or have their layers where TRL does not look (Llama 4).
    """
    text_config = text_config_of(model)
    bare: Any = bare_model(model)
    if any(getattr(text_config, name, None) is not None for name in _BEHIND_THE_LAYERS):
        return False
    done_by_trl = [name for name in _KNOWN_TO_TRL if getattr(text_config, name, None) not in (None, 1)]
    if done_by_trl and not all(name in _forward_source(bare.__class__) for name in done_by_trl):
        return False
    return _is_one_matrix_behind(bare)


@cache
def _forward_source(kind: Any) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):  # of a class without a file
        return ""


def _is_one_matrix_behind(bare: Any) -> bool:
    layers, output = bare.base_model, bare.get_output_embeddings()
    children = [child for child in bare.children() if next(child.parameters(), None) is not None]
    return layers is not bare and output is not None and all(child is layers or child is output for child in children)


def own_logits(model: nn.Module, inputs: dict[str, Any], num_tokens: int) -> tuple[Any, Tensor]:
    """What the model answers, and the logits of each of its records' tokens, (B, T, V).

    Args:
        model: maybe wrapped by PEFT.
        inputs: without labels.
        num_tokens: of a record; virtual tokens stand before them.
    """
    outputs = model(**inputs, use_cache=False)
    return outputs, outputs.logits[:, -num_tokens:]
