"""Encoder-decoders: which ones metier works on, and how one is told from a model that only decodes.

Their records are pairs (`metier.data.pairs`): the prompt goes into the encoder, the reply into the decoder.
"""

from __future__ import annotations

from torch import nn

from metier.errors import ModelError, UnsupportedModelError
from metier.models.unwrap import bare_model

ENCODER_DECODERS = frozenset({"switch_transformers"})
"""Model types whose MoE blocks can be made to follow the experts contract (`metier.models.foreign`)."""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether `model`, bare or wrapped by PEFT, has an encoder and a decoder."""
    return bool(getattr(getattr(bare_model(model), "config", None), "is_encoder_decoder", False))


def decoder_start_token(model: nn.Module) -> int:
    """The token that the decoder reads first.

    Raises:
        ModelError: neither the configuration nor the generation settings name one.
    """
    bare = bare_model(model)
    for owner in (getattr(bare, "config", None), getattr(bare, "generation_config", None)):
        token = getattr(owner, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise ModelError(
        f"{type(bare).__name__}: the configuration has no decoder_start_token_id, expected the token that the decoder "
        "begins with.\nAdd it to the model's config.json; T5 and Switch Transformers begin with the padding token."
    )


def refuse_encoder_decoder(model: nn.Module, what: str, remedy: str) -> None:
    """Raise an UnsupportedModelError where `what` cannot be done with an encoder-decoder."""
    if is_encoder_decoder(model):
        kind = type(bare_model(model)).__name__
        raise UnsupportedModelError(
            f"{what}: got an encoder-decoder ({kind}), expected a model that only decodes.\n{remedy}"
        )
