"""Whether records that share a row see each other: models of which they do are refused before the run."""

from __future__ import annotations

import pytest
import torch

from metier.data.collate import Collator, PaddingFreeCollator
from metier.data.encode import IGNORED, Encoded
from metier.errors import UnsupportedModelError
from metier.training.apart import check_records_stay_apart
from tiny_models import tiny_model

CLOSE = 1e-5
"""Float32: the two ways add the same numbers up in another order."""


def record(*ids: int) -> Encoded:
    return Encoded(list(ids), [IGNORED, *ids[1:]], "")


ITEMS = [record(9, 8, 7, 6, 5, 4), record(11, 12, 13), record(20, 21), record(3, 3, 3, 3), record(6, 7)]


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral", "olmoe", "llama"])
def test_records_stay_apart_and_have_the_loss_of_a_padded_batch(family: str) -> None:
    model = tiny_model(family)
    check_records_stay_apart(model, ITEMS)
    assert model.training
    model.eval()
    losses, grads = [], []
    for collator in (Collator(0), PaddingFreeCollator(0)):
        model.zero_grad()
        loss = model(**collator(ITEMS), use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (losses[0] - losses[1]).abs() < CLOSE
    assert (grads[0] - grads[1]).abs().max() < CLOSE


def test_a_model_that_carries_a_state_along_the_row_is_refused() -> None:
    model = tiny_model("nemotron_h", layers_block_type=["mamba", "attention", "moe"])
    with pytest.raises(
        UnsupportedModelError, match=r"(?s)padding_free: a record's logits change by .*padding_free: false"
    ):
        check_records_stay_apart(model, ITEMS)
    assert model.training


def test_gpt_oss_whose_mask_knows_no_positions_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="GptOssForCausalLM does not keep records apart"):
        check_records_stay_apart(tiny_model("gpt_oss"), ITEMS)


def test_a_model_that_overlooks_the_positions_is_refused() -> None:
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does not keep records apart"):
        check_records_stay_apart(model, ITEMS)


def test_with_a_single_record_there_is_nothing_to_keep_apart() -> None:
    check_records_stay_apart(tiny_model("llama"), ITEMS[:1])
