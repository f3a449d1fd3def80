"""A batch is padded to its longest record, and must hold something to train on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.data.collate import Collator, PaddingFreeCollator, fill_rows, padding_share
from metier.data.encode import IGNORED, Encoded
from metier.errors import DataError

SHORT = Encoded([5, 6], [IGNORED, 6], "a:1")
LONG = Encoded([7, 8, 9], [IGNORED, IGNORED, 9], "a:2")


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_batch_is_padded_to_its_longest_record(as_dict: bool) -> None:
    features = [SHORT, LONG]
    if as_dict:
        features = [{"input_ids": item.input_ids, "labels": item.labels} for item in features]
    batch = Collator(pad_token_id=1)(features)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [IGNORED, IGNORED, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("labels", [[IGNORED, IGNORED], [5, IGNORED]], ids=["none", "on the first token only"])
def test_a_batch_without_a_label_is_refused(labels: list[int]) -> None:
    empty = [Encoded([5, 6], labels, f"a.jsonl:{line}") for line in (3, 8)]
    with pytest.raises(
        DataError,
        match=r"a batch of 2 records without a single token to train on: a\.jsonl:3, a\.jsonl:8\..*--preview",
    ):
        Collator(pad_token_id=1)(empty)


def test_one_label_in_a_batch_is_enough() -> None:
    empty = Encoded([5, 6], [IGNORED, IGNORED], "a:3")
    assert (Collator(pad_token_id=1)([empty, SHORT])["labels"] != IGNORED).sum() == 1


def test_padding_free_rows_hold_several_records_whose_positions_begin_at_0() -> None:
    batch = PaddingFreeCollator(pad_token_id=1)([SHORT, Encoded([3, 4, 5, 6, 7], [3, 4, 5, 6, 7], "a:4"), LONG])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7], [7, 8, 9, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    none = IGNORED
    assert batch["labels"].tolist() == [[none, 4, 5, 6, 7], [none, none, 9, none, 6]]
    assert batch.keys() == {"input_ids", "labels", "position_ids"}


def test_what_is_left_of_a_row_is_padding_with_position_0_and_no_label() -> None:
    batch = PaddingFreeCollator(pad_token_id=1)([Encoded([3] * 6, [3] * 6, ""), SHORT])
    assert batch["input_ids"].tolist()[1] == [5, 6, 1, 1, 1, 1]
    assert batch["position_ids"].tolist()[1] == [0, 1, 0, 0, 0, 0]
    assert batch["labels"].tolist()[1][2:] == [IGNORED] * 4


def test_padding_free_refuses_a_batch_without_a_label() -> None:
    with pytest.raises(DataError, match="a batch of 1 records without a single token to train on"):
        PaddingFreeCollator(pad_token_id=1)([Encoded([5, 6], [5, IGNORED], "a:1")])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_every_record_gets_one_row_that_it_fits_into(lengths: list[int]) -> None:
    longest = max(lengths)
    rows = fill_rows(lengths, longest)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= longest for row in rows)
    full = [sum(lengths[index] for index in row) for row in rows]
    # no record of a later row would have fitted into an earlier one
    assert all(full[i] + lengths[index] > longest for i in range(len(rows)) for row in rows[i + 1 :] for index in row)


def test_the_share_of_padding() -> None:
    assert padding_share([10, 10, 10], 2) == 0
    assert padding_share([10, 2], 2) == 1 - 12 / 20
    assert padding_share([10, 2, 7], 1) == 0
