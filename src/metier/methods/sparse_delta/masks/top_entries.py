"""The entries with the best scores, over many parameters together, without all scores side by side.

The bits of non-negative float32 numbers, read as integers, are in the order of the numbers. So the score of the last
entry that is taken is found by counting: first the upper 16 bits of all scores, then the lower 16 of those that share
its upper ones. Three passes over the scores, one parameter at a time, and nothing is sorted.
"""

# N entries of one parameter, C of them at a time

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from metier.errors import ConfigError
from metier.methods.sparse_delta.masks.shares import index_dtype

_CHUNK = 1 << 22
"""Entries whose bits are counted at a time: 32 MiB of int64."""
_HALF = 16
_LARGEST = 0x7FFFFFFF

Scores = Mapping[str, Callable[[], Tensor]]
"""By parameter, how to get its scores; asked for three times, so that none need be kept."""


def top_entries(scores: Scores, count: int, *, largest: bool = True) -> dict[str, Tensor]:
    """The `count` entries with the largest (or smallest) scores; among equal ones the first.

    Args:
        scores: by parameter name, non-negative, of any shape; converted to float32 if they are not.
        count: over all parameters, at least 1 and at most as many as there are.

    Returns:
        By parameter, flat positions, sorted and unique; parameters without any are left out.

    Raises:
        ConfigError: a score is not a finite non-negative number, or there are fewer entries than `count`.
    """
    upper = _counts(scores, lambda keys_C: keys_C >> _HALF, largest)
    total = int(upper.sum())
    if not 1 <= count <= total:
        raise ConfigError(
            f"num_entries must be between 1 and the {total} entries of the target parameters, got {count}."
        )
    high, above = _crossing(upper, count)
    lower = _counts(scores, lambda keys_C: keys_C[keys_C >> _HALF == high] & ((1 << _HALF) - 1), largest)
    low, above_here = _crossing(lower, count - above)
    threshold = (high << _HALF) | low
    return _taken(scores, threshold, count - above - above_here, largest)


def _counts(scores: Scores, digit_of: Callable[[Tensor], Tensor], largest: bool) -> Tensor:
    counts = torch.zeros(1 << _HALF, dtype=torch.int64)
    for name, score in scores.items():
        for keys_C in _keys(name, score(), largest):
            counts += digit_of(keys_C).bincount(minlength=1 << _HALF).cpu()
    return counts


def _crossing(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The digit at which, from the top, `wanted` are reached, and how many lie above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place] - counts[len(counts) - 1 - place])


def _taken(scores: Scores, threshold: int, num_equal: int, largest: bool) -> dict[str, Tensor]:
    taken = {}
    for name, score in scores.items():
        found, first, size = [], 0, 0
        for keys_C in _keys(name, score(), largest):
            chosen_C = keys_C > threshold
            equal = (keys_C == threshold).nonzero().squeeze(1)[:num_equal]
            num_equal -= len(equal)
            chosen_C[equal] = True
            found.append(chosen_C.nonzero().squeeze(1) + first)
            first += len(keys_C)
        size = first
        indices = torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
        if len(indices):
            taken[name] = indices.to("cpu", index_dtype(size))
    return taken


def _keys(name: str, score: Tensor, largest: bool) -> Iterator[Tensor]:
    """Numbers in the order of the scores, the best the greatest, int64."""
    flat_N = score.reshape(-1)
    for part_C in flat_N.split(_CHUNK):
        part_C = part_C.float()
        if not bool(((part_C >= 0) & (part_C < torch.inf)).all()):
            raise ConfigError(
                f"{name}: a score is negative or not finite, expected finite numbers of at least 0.\n"
                "Look for inf or nan in the model's parameters, or in the loss of the batches."
            )
        # adding 0 turns a negative zero, whose bits are negative, into a positive one
        keys_C = (part_C + 0.0).view(torch.int32).long()
        yield keys_C if largest else _LARGEST - keys_C
