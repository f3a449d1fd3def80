"""Encoded records to one batch: padded to the longest, or several to a row without padding between them."""

# B records in a batch, R rows, T tokens of the longest record

from __future__ import annotations

import random
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
        items = _trainable(features)
        longest = max(len(item.input_ids) for item in items)
        return {
            "input_ids": padded([item.input_ids for item in items], longest, self.pad_token_id),
            "labels": padded([item.labels for item in items], longest, IGNORED),
            "attention_mask": padded([[1] * len(item.input_ids) for item in items], longest, 0),
        }


@dataclass(frozen=True, slots=True)
class PaddingFreeCollator:
    """Puts short records behind one another, in rows as long as the batch's longest: the same batch, less padding.

    Each record's positions begin at 0, by which transformers' attention masks keep records apart that share a row. A
    model whose layers look at their row otherwise (a recurrence, say) mixes them: `check_records_stay_apart` tells.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Encoded | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Fill rows.

        Args:
            features: at least one record.

        Returns:
            input_ids, labels and position_ids, each int64, (num_rows, longest). What is left of a row is filled with
            padding, each token of it a record by itself. A record's first token has no label: the token before it is
            another record's.

        Raises:
            DataError: there is no label in the whole batch, so its loss would be NaN.
        """
        items = _trainable(features)
        longest = max(len(item.input_ids) for item in items)
        rows = fill_rows([len(item.input_ids) for item in items], longest)
        ids = [[token for index in row for token in items[index].input_ids] for row in rows]
        labels = [[label for index in row for label in (IGNORED, *items[index].labels[1:])] for row in rows]
        positions = [[place for index in row for place in range(len(items[index].input_ids))] for row in rows]
        return {
            "input_ids": padded(ids, longest, self.pad_token_id),
            "labels": padded(labels, longest, IGNORED),
            "position_ids": padded(positions, longest, 0),
        }


def fill_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Which records stand in which row: first-fit decreasing, at most 11/9 of the fewest rows possible, and one more.

    Args:
        lengths: of the records, each at least 1 and at most `row_length`.
        row_length: tokens of a row.

    Returns:
        Indices into `lengths`, each in one row; rows and what is in them are in a fixed order.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        row = next((row for row, room in enumerate(left) if room >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(row_length)
        rows[row].append(index)
        left[row] -= lengths[index]
    return rows


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Which share of a padded batch is padding, over one pass in random order; 0 where there is nothing to pad."""
    order = random.Random(0).sample(lengths, len(lengths))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def _trainable(features: Sequence[Encoded | Mapping[str, Any]]) -> list[Encoded]:
    items = [item if isinstance(item, Encoded) else _encoded(item) for item in features]
    if not any(item.num_trained_tokens for item in items):
        origins = ", ".join(item.origin for item in items if item.origin) or "unknown"
        raise DataError(
            f"a batch of {len(items)} records without a single token to train on: {origins}. Every batch "
            f"needs an assistant's message; look at the records with --preview, or remove them."
        )
    return items


def _encoded(feature: Mapping[str, Any]) -> Encoded:
    return Encoded(list(feature["input_ids"]), list(feature["labels"]), str(feature.get("origin", "")))


def padded(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    """Rows of at most `length` numbers, filled with `value` on the right: int64, (num_rows, length)."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)
