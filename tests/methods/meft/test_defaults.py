"""Sizes that follow from the number of rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import ConfigError
from metier.methods.meft.defaults import KEY_STD, meft_sizes, router_scale


def test_the_papers_widest_adapter():
    sizes = meft_sizes(6144)
    # √(8 · 6144) is 222; 192 and 256 divide 6144 and are nearest
    assert (sizes.num_key_experts, sizes.rows_per_key_expert) == (192, 32)
    assert (sizes.num_active_key_experts, sizes.top_k, sizes.num_candidates) == (8, 64, 256)
    assert "222" in sizes.reasons()[0]


def test_few_candidates_lower_the_default_top_k_alone():
    assert meft_sizes(64).top_k == meft_sizes(64).num_candidates < 64


@given(st.integers(1, 20_000))
def test_every_number_of_rows_is_split_evenly_or_refused_with_one_that_works(r):
    try:
        sizes = meft_sizes(r)
    except ConfigError as error:
        r = int(str(error).rpartition("Take r=")[2].partition(",")[0])
        sizes = meft_sizes(r)
    assert sizes.num_key_experts * sizes.rows_per_key_expert == r
    assert sizes.top_k <= sizes.num_candidates
    best = math.sqrt(sizes.num_active_key_experts * r)
    assert best / 2 <= sizes.num_key_experts <= best * 2


@pytest.mark.parametrize("hidden_size", [64, 576])
def test_chosen_logits_begin_near_one(hidden_size):
    sizes = meft_sizes(6144)
    torch.manual_seed(0)
    keys = torch.randn(sizes.num_key_experts, sizes.rows_per_key_expert, hidden_size) * KEY_STD
    router = router_scale(sizes, hidden_size) * keys.mean(1)
    logits = torch.randn(2000, hidden_size) @ router.T
    chosen = logits.topk(sizes.num_active_key_experts).values
    assert chosen.mean() == pytest.approx(1, abs=0.1)
