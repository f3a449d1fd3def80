"""Attention with a prefix beside attention written out: outputs and gradients in every kind of attention there is."""

from __future__ import annotations

import peft
import pytest
import torch

from methods.prefix.reference import DENSE, decoder, with_plain_attention
from metier.methods.prefix import PrefixConfig, PrefixLayer

KINDS = [*DENSE, "llama", "deepseek_v2", "mixtral", "qwen3_moe", "gpt_oss"]
ONLY_EAGER = {"gpt_oss", "gemma2"}
"""transformers has no sdpa for attention sinks and for soft-capping."""
SIZE_OF_STEP = 0.7
"""Of random keys and values that attention pays attention to."""
ROUNDING = {"rtol": 2e-4, "atol": 2e-5}
"""float32 over two or three layers, summed in another order."""


def tokens(seed: int = 0, count: int = 9):
    return torch.randint(3, 64, (2, count), generator=torch.Generator().manual_seed(seed))


def layers(wrapped) -> list[PrefixLayer]:
    return [module for module in wrapped.modules() if isinstance(module, PrefixLayer)]


def wrapped_model(kind: str, *, implementation=None, **options):
    base = decoder(kind, implementation=implementation)
    wrapped = peft.get_peft_model(base, PrefixConfig(num_prefix_tokens=3, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "prefix_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * SIZE_OF_STEP
    return wrapped


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_attention_written_out(kind, gated, implementation):
    if implementation == "sdpa" and kind in ONLY_EAGER:
        pytest.skip("transformers computes it by eager attention alone")
    wrapped = wrapped_model(kind, implementation=implementation, gated=gated)
    plain = decoder(kind, implementation=implementation)
    reference = with_plain_attention(plain, layers(wrapped))
    with wrapped.disable_adapter():
        assert not torch.allclose(wrapped(tokens()).logits, plain(tokens()).logits, atol=1e-2), "no effect to compare"
    torch.testing.assert_close(wrapped(tokens()).logits, plain(tokens()).logits, **ROUNDING)
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    plain(input_ids=tokens(), labels=tokens()).loss.backward()
    for layer, other in zip(layers(wrapped), reference, strict=True):
        torch.testing.assert_close(layer.tuned_prefix_key["default"].grad, other.key.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.tuned_prefix_value["default"].grad, other.value.grad, rtol=1e-3, atol=1e-5)
        if gated:
            gate = layer.tuned_prefix_gate["default"]
            torch.testing.assert_close(gate.weight.grad, other.gate.weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_is_not_seen(kind, side):
    wrapped, plain = wrapped_model(kind, gated=True), decoder(kind)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    for reference in with_plain_attention(plain, layers(wrapped)):
        reference.padding_BT = padding
    got = wrapped(tokens(), attention_mask=padding).logits[padding.bool()]
    expected = plain(tokens(), attention_mask=padding).logits[padding.bool()]
    torch.testing.assert_close(got, expected, **ROUNDING)
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", ["llama_gqa", "mistral", "gemma2", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_says_what_it_says_without_one(kind, cache):
    wrapped = wrapped_model(kind, gated=True)
    padding = torch.ones(2, 5, dtype=torch.long)
    padding[1, :2] = 0
    given = {"attention_mask": padding, "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with_cache = wrapped.generate(input_ids=tokens(count=5), **given, **options)
    without = wrapped.generate(input_ids=tokens(count=5), **given, use_cache=False)
    assert torch.equal(with_cache, without)
    with wrapped.disable_adapter():
        assert not torch.equal(with_cache, wrapped.generate(input_ids=tokens(count=5), **given))


def test_one_token_at_a_time_gives_the_logits_of_all_at_once():
    wrapped = wrapped_model("mistral")
    past, steps = None, []
    for position in range(9):
        out = wrapped(tokens()[:, position : position + 1], past_key_values=past, use_cache=True)
        past, steps = out.past_key_values, [*steps, out.logits]
    torch.testing.assert_close(torch.cat(steps, 1), wrapped(tokens()).logits, **ROUNDING)


def test_a_token_does_not_see_what_comes_after_it_through_its_gate():
    wrapped, other = wrapped_model("llama", gated=True), tokens()
    other[:, 6:] = 5
    torch.testing.assert_close(wrapped(tokens()).logits[:, :6], wrapped(other).logits[:, :6])
