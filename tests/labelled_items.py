"""A few records with labels on some of their tokens, and a batch of them as a trainer has it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metier.data.collate import Collator
from metier.data.encode import Encoded

ITEMS = [
    Encoded(list(range(5, 25)), [-100] * 15 + list(range(20, 25)), "long"),
    Encoded(list(range(7, 14)), [-100] * 4 + list(range(11, 14)), "short"),
    Encoded(list(range(30, 36)), list(range(30, 36)), "all of it"),
]
NUM_LABELLED = 5 + 3 + 5


def batch_of(items: Sequence[Encoded]) -> dict[str, Tensor]:
    batch = Collator(0)([{"input_ids": i.input_ids, "labels": i.labels, "origin": i.origin} for i in items])
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
