"""Do records that share a row stay apart in this model? Looked at before a padding-free run, on the run's own data.

Attention keeps them apart by their positions, which transformers turns into a mask. Layers that carry a state along
the row (Mamba, linear attention, short convolutions) may not, and nothing would say so: the run would just be wrong.
"""

# T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metier.data.encode import Item
from metier.errors import UnsupportedModelError

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Difference of the logits by their spread. In 32 bits only the order of sums differs between the two ways."""
TOLERANCE_16_BITS = 0.1
"""In 16 bits a token may even change an expert by rounding; a record that sees another differs by more."""

MOST_TOKENS = 512
"""A record is long enough to tell with so many tokens."""


def check_records_stay_apart(model: nn.Module, items: Sequence[Item]) -> None:
    """Compare a record's logits behind another record of its row with those it has alone.

    Args:
        model: in whatever mode; it is put back.
        items: the run's records; two of them are looked at.

    Raises:
        UnsupportedModelError: they differ by more than rounding.
    """
    pair = _two_records(items)
    if pair is None:
        return
    was_training = model.training
    model.eval()
    try:
        difference = _difference(model, *pair)
    finally:
        model.train(was_training)
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCE.get(dtype, TOLERANCE_16_BITS)
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"padding_free: a record's logits change by {difference:.2g} of their spread when another record stands "
            f"before it in its row, expected at most {tolerance:g}: {type(model).__name__} does not keep records "
            "apart by their positions.\nTrain with padding_free: false."
        )


def _two_records(items: Sequence[Item]) -> tuple[list[int], list[int]] | None:
    """The longest record and the first one that differs from it, cut; None where there are no two of them."""
    longest = max(items, key=lambda item: len(item.input_ids)).input_ids[:MOST_TOKENS]
    other = next((i.input_ids[:MOST_TOKENS] for i in items if i.input_ids[:MOST_TOKENS] != longest), None)
    return None if other is None else (longest, other)


@torch.no_grad()
def _difference(model: nn.Module, first: list[int], second: list[int]) -> float:
    """How far the second record's logits move, by their standard deviation over the vocabulary."""
    shared_TV = _logits(model, [first, second])[len(first) :]
    alone_TV = _logits(model, [second])
    moved_T = (shared_TV - alone_TV).square().mean(-1).sqrt()
    return float(moved_T.mean() / alone_TV.std(-1).mean())


def _logits(model: nn.Module, records: list[list[int]]) -> Tensor:
    """(T, V) float32 of records in one row, as PaddingFreeCollator lays them."""
    device = next(model.parameters()).device
    ids = torch.tensor([[token for record in records for token in record]], device=device)
    positions = torch.tensor([[place for record in records for place in range(len(record))]], device=device)
    logits_TV: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    return logits_TV.float()
