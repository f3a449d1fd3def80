"""Encoded records to one padded batch."""

# B records in a batch, T tokens of the longest

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metier.data.encode import IGNORED, Encoded
from metier.errors import DataError


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads a batch to its longest record, on the right.

    Works as the `data_collator` of transformers' and TRL's trainers, on `Encoded` or dicts with its fields.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Encoded | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack.

        Args:
            features: at least one record.

        Returns:
            input_ids, labels and attention_mask, each int64, (num_records, longest).

        Raises:
            DataError: there is no label in the whole batch, so its loss would be NaN.
        """
        items = [item if isinstance(item, Encoded) else _encoded(item) for item in features]
        if not any(item.num_trained_tokens for item in items):
            origins = ", ".join(item.origin for item in items if item.origin) or "unknown"
            raise DataError(
                f"a batch of {len(items)} records without a single token to train on: {origins}. Every batch "
                f"needs an assistant's message; look at the records with --preview, or remove them."
            )
        longest = max(len(item.input_ids) for item in items)
        return {
            "input_ids": _padded([item.input_ids for item in items], longest, self.pad_token_id),
            "labels": _padded([item.labels for item in items], longest, IGNORED),
            "attention_mask": _padded([[1] * len(item.input_ids) for item in items], longest, 0),
        }


def _encoded(feature: Mapping[str, Any]) -> Encoded:
    return Encoded(list(feature["input_ids"]), list(feature["labels"]), str(feature.get("origin", "")))


def _padded(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)
