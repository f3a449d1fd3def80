"""Where a decoder's layers and its last norm are, for methods that stand beside the whole decoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.encoder_decoder import refuse_encoder_decoder
from metier.models.layers import layer_stacks
from metier.models.spellings import OTHER_MODALITY
from metier.models.unwrap import bare_model

LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f")
"""Children that a decoder has beside its layers: what the hidden state goes through after the last of them."""


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """Module paths in the bare model."""

    path: str
    """The module that calls the layers one by one; "" where it is the bare model itself."""
    layer_paths: tuple[str, ...]
    norm_path: str


def decoder_parts(model: nn.Module) -> DecoderParts:
    """The one decoder of a model, bare or wrapped by PEFT; of a multimodal model, that for text.

    Raises:
        UnsupportedModelError: an encoder-decoder, no stack of layers or several, or none of `LAST_NORMS` after it.
    """
    refuse_encoder_decoder(model, "decoder layers", "Its two halves have layers of different kinds.")
    bare = bare_model(model)
    name = type(bare).__name__
    stacks = {id(stack) for stack in layer_stacks(bare)}
    paths = [path for path, m in bare.named_modules() if id(m) in stacks and not OTHER_MODALITY.search(f"{path}.")]
    if len(paths) != 1:
        raise UnsupportedModelError(
            f"{name}: has {len(paths)} stacks of decoder layers ({', '.join(paths) or 'none'}), expected one."
        )
    owner = paths[0].rpartition(".")[0]
    prefix = f"{owner}." if owner else ""
    children = bare.get_submodule(owner)._modules
    norm = next((child for child in LAST_NORMS if isinstance(children.get(child), nn.Module)), None)
    if norm is None:
        raise UnsupportedModelError(
            f"{name}: no norm follows the layers of {paths[0]}; looked for {', '.join(LAST_NORMS)} beside them and "
            f"found {', '.join(children)}."
        )
    layers = bare.get_submodule(paths[0])
    return DecoderParts(owner, tuple(f"{paths[0]}.{number}" for number in layers._modules), f"{prefix}{norm}")
