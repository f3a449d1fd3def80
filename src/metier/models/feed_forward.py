"""Where a decoder's feed-forward blocks are: an MLP or a whole MoE block in every layer, under one of a few names."""

from __future__ import annotations

from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.encoder_decoder import refuse_encoder_decoder
from metier.models.spellings import LAYER_INDEX, OTHER_MODALITY
from metier.models.unwrap import bare_model, base_path

NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe", "feedforward", "mlp_block", "shared_mlp")
"""Children of a decoder layer, in this order where a layer has two of them."""


def feed_forward_paths(model: nn.Module) -> list[str]:
    """Module paths in the bare model, one for each decoder layer that has a feed-forward block, in the model's order.

    Raises:
        UnsupportedModelError: an encoder-decoder, or a model that has none under a known name.
    """
    refuse_encoder_decoder(model, "feed-forward blocks", "Its two halves have blocks of different kinds.")
    bare = bare_model(model)
    found: dict[str, str] = {}
    for raw_path, _ in bare.named_modules():
        path = base_path(raw_path)
        layer, _, name = path.rpartition(".")
        if name not in NAMES or not _is_layer(layer) or OTHER_MODALITY.search(path):
            continue
        if layer not in found or NAMES.index(name) < NAMES.index(found[layer].rpartition(".")[2]):
            found[layer] = path
    if not found:
        children = [path.rpartition(".") for path, _ in bare.named_modules()]
        kinds = sorted({name for layer, _, name in children if _is_layer(layer)})
        raise UnsupportedModelError(
            f"{type(bare).__name__}: no decoder layer has a feed-forward block named {', '.join(NAMES)}; its layers "
            f"have {', '.join(kinds) or 'no children'}.\nName the modules yourself by target_modules, if there are "
            "any: where a layer computes the block itself, as OPT's do, nothing can stand beside it."
        )
    return list(found.values())


def hidden_size_of(model: nn.Module) -> int:
    """The width of what a feed-forward block reads and writes.

    Raises:
        UnsupportedModelError: the configuration does not say.
    """
    return _configured(model, "hidden_size")


def num_layers_of(model: nn.Module) -> int:
    """Decoder layers of the model.

    Raises:
        UnsupportedModelError: the configuration does not say.
    """
    return _configured(model, "num_hidden_layers")


def _configured(model: nn.Module, name: str) -> int:
    config = getattr(bare_model(model), "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    value = getattr(text, name, None)
    if not isinstance(value, int):
        raise UnsupportedModelError(f"{type(bare_model(model)).__name__}: its configuration has no {name}.")
    return value


def _is_layer(path: str) -> bool:
    """Whether `path` ends in a stack's name and a number, such as `model.layers.7`."""
    found = list(LAYER_INDEX.finditer(f"{path}."))
    return bool(found) and found[-1].end() == len(path)
