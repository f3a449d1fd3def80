"""A batch is padded to its longest record, and must hold something to train on."""

from __future__ import annotations

import pytest
import torch

from metier.data.collate import Collator
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
