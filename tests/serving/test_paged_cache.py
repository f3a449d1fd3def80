"""Prefixes of the cache are a delta's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from metier.serving.paged_cache import MOST_KEYS, DeltaCache, cache_config, keyed_tokens

TOKENS = st.lists(st.integers(0, 2**20 - 1), min_size=5, max_size=40)
KEYS = st.integers(0, MOST_KEYS - 1)


@given(TOKENS, TOKENS, KEYS, KEYS)
def test_tokens_are_equal_only_where_tokens_and_keys_are(first: list[int], second: list[int], a: int, b: int) -> None:
    assert (keyed_tokens(first, a) == keyed_tokens(second, b)) == (first == second and a == b)
    assert (keyed_tokens(first, a) == keyed_tokens(first, b)) == (a == b)


@given(TOKENS, KEYS)
def test_keyed_tokens_fit_where_the_cache_keeps_tokens(tokens: list[int], key: int) -> None:
    assert all(0 <= token < 2**31 for token in keyed_tokens(tokens, key))


@given(TOKENS)
def test_the_base_keeps_its_tokens(tokens: list[int]) -> None:
    assert keyed_tokens(tokens, 0) == tokens


def test_latent_attention_needs_room_for_whole_heads() -> None:
    sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_attention_heads": 4}
    read = cache_config(AutoConfig.for_model("deepseek_v2", **sizes))
    assert (read.head_dim, read.num_key_value_heads) == (12, 4)


def test_other_attention_is_read_as_it_is() -> None:
    config = AutoConfig.for_model("olmoe")
    assert cache_config(config) is config


def test_a_request_in_several_blocks_is_read_block_by_block() -> None:
    # four tokens a block, of two layers: the last of ten tokens lies nine places after the first, with others between
    read_index = torch.tensor([0, 1, 2, 3, 40, 41, 42, 43, 8, 9, 16, 17, 18])
    ends = torch.tensor([0, 10, 13])
    spans = DeltaCache._spans(SimpleNamespace(_last_spans=None), read_index, ends, 4)  # type: ignore[arg-type]
    cached = torch.arange(50)
    assert [span(cached).tolist() for span in spans] == [read_index[:10].tolist(), read_index[10:].tolist()]


def test_a_vocabulary_that_leaves_no_room_for_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="its vocabulary has 2,000,000 entries, expected at most 1,048,576"):
        cache_config(AutoConfig.for_model("olmoe", vocab_size=2_000_000))
