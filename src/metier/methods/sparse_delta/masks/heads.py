"""Whole attention heads: rows of queries, keys and values, and columns of the output, as entries.

A head's score is the sum of its entries' scores (the trace of its block of the Fisher information, or the squared norm
of its gradient). With grouped attention a head's keys and values are its group's, and are trained once.

Structural masks in the survey's sense (arXiv:2403.14608, structural selective fine-tuning).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from metier.errors import ConfigError
from metier.methods.sparse_delta.masks.shares import index_dtype
from metier.models.attention_heads import AttentionHeads, HeadPart


def entries_of_heads(
    heads: Sequence[AttentionHeads], chosen: Mapping[int, Collection[int]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The flat positions of the chosen heads' entries.

    Args:
        heads: of every decoder layer.
        chosen: heads by decoder layer.
        shapes: of the parameters that may be trained; parts in others are left out.

    Raises:
        ConfigError: a layer or a head that does not exist.
    """
    entries = {}
    for part, numbers in _parts(heads, chosen, shapes):
        mask = torch.zeros(shapes[part.path], dtype=torch.bool, device="cpu")
        for number in numbers:
            mask.narrow(part.axis, part.slice_of(number).start, part.size).fill_(True)
        flat = mask.view(-1).nonzero().squeeze(1)
        entries[part.path] = flat.to(index_dtype(mask.numel()))
    return entries


def counts_of_heads(
    heads: Sequence[AttentionHeads], chosen: Mapping[int, Collection[int]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """How many entries that are; arguments and errors as `entries_of_heads`."""
    counts = {}
    for part, numbers in _parts(heads, chosen, shapes):
        shape = shapes[part.path]
        num_slices = len({part.slice_of(number).start for number in numbers})
        counts[part.path] = num_slices * part.size * (math.prod(shape) // shape[part.axis])
    return counts


def _parts(
    heads: Sequence[AttentionHeads], chosen: Mapping[int, Collection[int]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[HeadPart, Collection[int]]]:
    """Parts of chosen heads in those parameters, each with the heads."""
    by_layer = {found.layer: found for found in heads}
    for layer, numbers in sorted(chosen.items()):
        if layer not in by_layer:
            raise ConfigError(f"heads names layer {layer}, but layers with attention are {sorted(by_layer)}.")
        found = by_layer[layer]
        if stray := [number for number in numbers if not 0 <= number < found.num_heads]:
            raise ConfigError(f"heads names head {stray[0]} of layer {layer}, which has num_heads={found.num_heads}.")
        yield from ((part, numbers) for part in found.parts if part.path in shapes and numbers)


def best_heads(
    heads: Sequence[AttentionHeads],
    scores: Mapping[str, Tensor],
    count: int,
    num_entries_of: Callable[[Mapping[int, Collection[int]]], int],
) -> dict[int, list[int]]:
    """The heads with the largest sums of scores whose entries together are at most `count`, and at least one head."""
    totals = []
    for found in heads:
        for number in range(found.num_heads):
            parts = [part for part in found.parts if part.path in scores]
            of_parts = [scores[part.path].narrow(part.axis, part.slice_of(number).start, part.size) for part in parts]
            totals.append((sum(float(x.sum()) for x in of_parts), -found.layer, -number))
    chosen: dict[int, list[int]] = {}
    for _, layer, number in sorted(totals, reverse=True):
        more = {**chosen, -layer: sorted([*chosen.get(-layer, []), -number])}
        if chosen and num_entries_of(more) > count:
            break
        chosen = more
    return chosen
