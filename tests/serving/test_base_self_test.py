"""A base is served only where the batch says of it what it says itself."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

from families.chain import made_model
from families.configs import tiny_config
from families.discovery import contract_families, model_type
from metier.errors import ServingError, UnsupportedModelError
from metier.serving.base_self_test import base_self_test
from metier.serving.paged_batch import BatchLimits, PagedBatch
from metier.serving.start import start_engine
from tiny_models import tiny_tokenizer


def made(kind: str) -> PreTrainedModel:
    return made_model(tiny_config(kind)).eval()


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3", "gpt_oss", "afmoe", "llama"])
def test_a_batch_says_what_the_model_says(kind: str) -> None:
    model = made(kind)
    before = model.config._attn_implementation
    assert base_self_test(model) < 1e-5
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_no_difference(dtype: torch.dtype) -> None:
    base_self_test(made("olmoe").to(dtype))


def test_a_model_with_attention_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="log probabilities in a batch differ from its own by"):
        base_self_test(made("stablelm"))


def test_a_model_that_fails_in_a_batch_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"it fails in a batch \(The size of tensor"):
        base_self_test(made("falcon"))


@pytest.mark.parametrize(("family", "kind"), [("nemotron_h", "linear_attention"), ("llama4_text", "chunked_attention")])
def test_a_model_with_layers_that_the_batch_does_not_have_is_refused(family: str, kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"Invalid layer type: {kind}"):
        base_self_test(made(family))


def test_a_server_does_not_start_on_such_a_base(tmp_path: Path) -> None:
    made("stablelm").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="StableLmForCausalLM: transformers' continuous batching does not"):
        start_engine(str(tmp_path), {})


def test_a_cache_that_does_not_fit_is_refused() -> None:
    limits = BatchLimits(max_requests=2, max_batch_tokens=32, cache_tokens=10**13)
    with pytest.raises(ServingError, match="a KV cache of 10,000,000,000,000 tokens does not fit"):
        PagedBatch(made("olmoe"), limits, lambda _: None)


def test_a_cache_that_nobody_asked_for_is_as_large_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda _: 20_000_000)
    asked = 10**6
    limits = BatchLimits(max_requests=2, max_batch_tokens=32, cache_tokens=asked, fewer_will_do=True)
    batch = PagedBatch(made("olmoe"), limits, lambda _: None)
    assert 1000 < batch.cache_tokens < asked
    enough = BatchLimits(max_requests=2, max_batch_tokens=32, cache_tokens=1000, fewer_will_do=True)
    assert PagedBatch(made("olmoe"), enough, lambda _: None).cache_tokens == 1024


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(contract_families()))
def test_every_family_is_served_rightly_or_refused(family: str) -> None:
    kind = model_type(family)
    if kind is None:
        pytest.skip("no model for language")
    with suppress(UnsupportedModelError):
        assert base_self_test(made(kind)) < 1e-5
