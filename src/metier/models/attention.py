"""Where a decoder's attention modules are, and how wide their keys and values are when attention is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from metier.errors import UnsupportedModelError
from metier.models.encoder_decoder import refuse_encoder_decoder
from metier.models.layers import layer_index
from metier.models.spellings import OTHER_MODALITY
from metier.models.unwrap import bare_model, base_module, base_path, original_module

NAMES = ("self_attn", "attn", "attention", "self_attention", "cross_attn", "linear_attn")
"""Children of a decoder layer that are attention, whatever their class is called; others beside them have names alike,
such as `attn_hc`, which mixes DeepSeek V4's residual streams."""

QUERY_NAMES = ("q_proj", "q_b_proj", "query", "wq")
VALUE_NAMES = ("v_proj", "kv_b_proj", "value", "wv")
"""Projections that make queries and values; where attention is latent (MLA), the second makes keys as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSizes:
    """What an attention module hands to transformers' attention interface, after the cache and before heads repeat."""

    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int


def attention_paths(model: nn.Module) -> list[str]:
    """Module paths in the bare model, in its order: self-attention, cross-attention and linear attention of every
    decoder layer. Mamba mixers are none.

    Raises:
        UnsupportedModelError: an encoder-decoder, or a model that has none as children of its layers.
    """
    refuse_encoder_decoder(model, "attention modules", "Its two halves have attention of different kinds.")
    bare = bare_model(model)
    paths = []
    for raw_path, module in bare.named_modules():
        path = base_path(raw_path)
        layer, _, name = path.rpartition(".")
        in_layer = layer_index(layer) is not None and not OTHER_MODALITY.search(path)
        if in_layer and path not in paths and _is_attention(name, original_module(module)):
            paths.append(path)
    if not paths:
        raise UnsupportedModelError(
            f"{type(bare).__name__}: no decoder layer has a child that is an attention module.\n"
            "Name the modules yourself by target_modules."
        )
    return paths


def interface_paths(model: nn.Module) -> list[str]:
    """Those of `attention_paths` that compute attention through transformers' attention interface.

    In models that mix kinds of attention, linear attention is left out: it has no keys to attend to.

    Raises:
        UnsupportedModelError: there are none.
    """
    bare, paths = bare_model(model), attention_paths(model)
    modules = {path: base_module(bare, path) for path in paths}
    found = [path for path, module in modules.items() if module is not None and calls_interface(module)]
    if not found:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise UnsupportedModelError(
            f"{type(bare).__name__}: none of its attention modules ({', '.join(kinds)}) calls transformers' attention "
            "interface, expected at least one.\nUse a method that leaves attention as it is."
        )
    return found


def calls_interface(module: nn.Module) -> bool:
    """Whether the module's own code computes attention through `ALL_ATTENTION_FUNCTIONS`."""
    return _forward_calls_interface(type(original_module(module)).forward)


def head_sizes(module: nn.Module, path: str) -> HeadSizes:
    """The sizes of a module's keys and values, by its projections and its configuration; no weights are read.

    Args:
        module: an attention module, wrapped or not; its weights may be on the meta device.
        path: its name in errors.

    Raises:
        UnsupportedModelError: they do not follow from what the module and its configuration say.
    """
    module = original_module(module)
    num_heads = _first_int(module, "num_heads", "num_attention_heads")
    if hasattr(module, "kv_b_proj"):
        key_dim, value_dim = _first_int(module, "qk_head_dim"), _first_int(module, "v_head_dim")
        return HeadSizes(
            num_key_value_heads=_known(num_heads, "num_attention_heads", path),
            key_head_dim=_known(key_dim, "qk_head_dim", path),
            value_head_dim=_known(value_dim, "v_head_dim", path),
        )
    head_dim = _first_int(module, "head_dim", "head_size")
    if head_dim is None:
        width = _first_int(module, "hidden_size", "embed_dim")
        head_dim = None if width is None or num_heads is None else width // num_heads
    key_head_dim = _known(head_dim, "head_dim", path)
    keys, values = _out_features(module, "k_proj"), _out_features(module, "v_proj")
    num_key_value_heads = keys // key_head_dim if keys else _num_key_value_heads(module, num_heads, path)
    return HeadSizes(
        num_key_value_heads=num_key_value_heads,
        key_head_dim=key_head_dim,
        value_head_dim=values // num_key_value_heads if values else key_head_dim,
    )


def query_value_names(module: nn.Module, path: str) -> list[str]:
    """Names of the children of an attention module that make its queries and its values, two of them.

    Raises:
        UnsupportedModelError: it has no separate ones; names the children that it has.
    """
    module = original_module(module)
    names = []
    for kind, choices in (("queries", QUERY_NAMES), ("values", VALUE_NAMES)):
        name = next((n for n in choices if getattr(module, n, None) is not None), None)
        if name is None:
            children = ", ".join(n for n, _ in module.named_children()) or "none"
            raise UnsupportedModelError(
                f"{path}: {type(module).__name__} has no projection of its own for {kind}, expected one of "
                f"{', '.join(choices)}; its children are {children}.\nName the projections to adapt yourself."
            )
        names.append(name)
    return names


def _num_key_value_heads(module: nn.Module, num_heads: int | None, path: str) -> int:
    # how often heads repeat says more than the configuration: DeepSeek V4 has one head whatever that says
    groups = _first_int(module, "num_key_value_groups")
    if groups and num_heads:
        return num_heads // groups
    return _known(_first_int(module, "num_key_value_heads", "num_kv_heads") or num_heads, "num_key_value_heads", path)


def _is_attention(name: str, module: nn.Module) -> bool:
    return (name in NAMES or type(module).__name__.endswith("Attention")) and any(True for _ in module.parameters())


@lru_cache
def _forward_calls_interface(forward: Callable[..., object]) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):  # code without a source: the first forward pass would tell, but too late
        return False


def _out_features(module: nn.Module, name: str) -> int | None:
    projection = getattr(module, name, None)
    features = None if projection is None else getattr(original_module(projection), "out_features", None)
    return features if isinstance(features, int) else None


def _first_int(module: nn.Module, *names: str) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _known(value: int | None, name: str, path: str) -> int:
    if not value:
        raise UnsupportedModelError(
            f"{path}: neither the module nor its configuration says {name}, so that the sizes of its keys and values "
            "are unknown.\nUse a method that leaves attention as it is."
        )
    return value
