"""Keys and values of a side network between the steps of a generation: more layers of the backbone's own cache.

So whatever happens to that cache (beam search reorders it, assisted generation crops it, a caller copies it) happens to
the side network's part too.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from metier.errors import DeltaError, UnsupportedModelError

_PLACES = "_metier_ladder_layers"


def side_cache_layer(cache: Any, rung: tuple[str, str], *, num_layers: int, num_past: int) -> DynamicLayer:
    """A rung's layer of a cache, behind those of the backbone; made when the cache is new. It keeps every token.

    Args:
        cache: the backbone's.
        rung: the adapter's name and the decoder layer's path.
        num_layers: decoder layers of the backbone.
        num_past: tokens that the cache held before this forward pass.

    Raises:
        UnsupportedModelError: a cache of a fixed size, or none of transformers'.
        DeltaError: the cache was filled by passes in which this rung had no part.
    """
    if not isinstance(cache, Cache) or any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise UnsupportedModelError(
            f"ladder: got a cache of type {type(cache).__name__} "
            "whose size is fixed or unknown, expected one that grows.\nGenerate without cache_implementation."
        )
    places = vars(cache).setdefault(_PLACES, {})
    if rung not in places:
        while len(cache.layers) < num_layers:  # it grows with the backbone's first pass, and ours come behind
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        places[rung] = len(cache.layers)
        cache.layers.append(DynamicLayer())
    layer: DynamicLayer = cache.layers[places[rung]]
    if layer.get_seq_length() != num_past:
        raise DeltaError(
            f"{rung[1]}: the cache holds {num_past} tokens of the backbone, but {layer.get_seq_length()} of ladder "
            f"'{rung[0]}'; it was filled without this adapter.\nStart from an empty cache after switching adapters."
        )
    return layer
