"""Where an attention head's rows and columns lie: in separate projections with grouped keys and values, and in MLA."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.base_parameters import base_modules, language_layer_index
from metier.models.encoder_decoder import refuse_encoder_decoder
from metier.models.unwrap import bare_model, base_module

_QUERIES = ("q_proj", "q_b_proj")
_KEYS_AND_VALUES = (("k_proj", "v_proj"), ("kv_b_proj",))
_OUTPUT = "o_proj"


@dataclass(frozen=True, slots=True)
class HeadPart:
    """What belongs to each head in one parameter: as many slices of one axis as there are heads of that kind."""

    path: str
    """Of the parameter, in the bare model."""
    axis: int
    """0 for rows, 1 for columns."""
    size: int
    """Rows or columns of one head."""
    heads_per_slice: int
    """Query heads that share a slice; more than 1 for keys and values of grouped attention."""

    def slice_of(self, head: int) -> slice:
        first = head // self.heads_per_slice * self.size
        return slice(first, first + self.size)


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """The query heads of one decoder layer."""

    layer: int
    num_heads: int
    parts: tuple[HeadPart, ...]


def attention_heads(model: nn.Module) -> list[AttentionHeads]:
    """The heads of every decoder layer that has attention, in order.

    Raises:
        UnsupportedModelError: an encoder-decoder, or a model whose attention has no separate projections.
    """
    refuse_encoder_decoder(model, "attention heads", "Its two halves have attention of different kinds.")
    bare = bare_model(model)
    config = getattr(bare, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    num_heads = getattr(config, "num_attention_heads", None)
    blocks: dict[str, dict[str, nn.Module]] = {}
    for path, module in base_modules(bare):
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and language_layer_index(f"{path}.") is not None:
            blocks.setdefault(parent, {})[name] = module
    num_groups = getattr(config, "num_key_value_heads", None) or num_heads
    found = [
        _heads(path, children, num_heads, num_groups, base_module(bare, path))
        for path, children in blocks.items()
        if _OUTPUT in children
    ]
    if not found or not isinstance(num_heads, int):
        raise UnsupportedModelError(
            f"{type(bare).__name__}: no decoder layer has attention with separate projections q_proj (or q_b_proj), "
            f"k_proj and v_proj (or kv_b_proj) and {_OUTPUT}.\nIts heads cannot be told apart: choose entries by "
            "another mask."
        )
    return sorted(found, key=lambda heads: heads.layer)


def _heads(
    path: str, children: dict[str, nn.Module], num_heads: int | None, num_groups: int | None, module: nn.Module | None
) -> AttentionHeads:
    queries = next((name for name in reversed(_QUERIES) if name in children), None)
    keys = next((names for names in _KEYS_AND_VALUES if all(name in children for name in names)), None)
    layer = language_layer_index(f"{path}.")
    if queries is None or keys is None or layer is None or not num_heads or not num_groups:
        raise UnsupportedModelError(
            f"{path}: attention has {', '.join(children)}, expected q_proj (or q_b_proj), k_proj and v_proj (or "
            f"kv_b_proj) beside {_OUTPUT}.\nIts heads cannot be told apart: choose entries by another mask."
        )
    shapes = {name: tuple(child.weight.shape) for name, child in children.items()}  # type: ignore[arg-type]
    # families may give layers different numbers of heads (Laguna, Step-3.7): the module has the size of one
    head_dim = getattr(module, "head_dim", None)
    if queries == "q_proj" and keys == _KEYS_AND_VALUES[0] and isinstance(head_dim, int):
        num_heads = shapes[_OUTPUT][1] // (getattr(module, "v_head_dim", None) or head_dim)
        num_groups = shapes[keys[0]][0] // head_dim
    if shapes[queries][0] % num_heads or shapes[_OUTPUT][1] % num_heads:
        raise UnsupportedModelError(
            f"{path}: {queries} has {shapes[queries][0]} outputs and {_OUTPUT} {shapes[_OUTPUT][1]} inputs, which are "
            f"no {num_heads} heads.\nIts heads cannot be told apart: choose entries by another mask."
        )
    parts = [_part(path, queries, 0, shapes[queries][0] // num_heads, 1, children)]
    parts += [_part(path, _OUTPUT, 1, shapes[_OUTPUT][1] // num_heads, 1)]
    for name in keys:
        # MLA expands a latent vector to keys and values of each head, a slice a head
        num_slices = num_heads if name == "kv_b_proj" else num_groups
        parts.append(_part(path, name, 0, shapes[name][0] // num_slices, num_heads // num_slices, children))
    return AttentionHeads(layer, num_heads, tuple(part for group in parts for part in group))


def _part(
    path: str, name: str, axis: int, size: int, heads_per_slice: int, children: dict[str, nn.Module] | None = None
) -> list[HeadPart]:
    weight = HeadPart(f"{path}.{name}.weight", axis, size, heads_per_slice)
    # a bias belongs to the rows; the output's belongs to no head
    has_bias = children is not None and getattr(children[name], "bias", None) is not None
    return [weight, HeadPart(f"{path}.{name}.bias", 0, size, heads_per_slice)] if has_bias else [weight]
