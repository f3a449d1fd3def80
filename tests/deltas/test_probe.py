"""The tokens that models are compared on, and the measure of nearness."""

from __future__ import annotations

import math

import torch

from deltas.made import FAMILIES
from metier.deltas.probe import largest_difference, logits_of, probe_tokens
from tiny_models import VOCAB_SIZE, tiny_model


def test_tokens_are_always_the_same_and_fit_the_model() -> None:
    model = tiny_model("deepseek_v2", **FAMILIES["deepseek_v2"])
    tokens_BS = probe_tokens(model)
    assert tokens_BS.shape == (4, 64)
    assert torch.equal(tokens_BS, probe_tokens(tiny_model("mixtral")))
    assert tokens_BS.min() >= 0
    assert tokens_BS.max() < VOCAB_SIZE
    model.config.max_position_embeddings = 9
    assert probe_tokens(model).shape == (4, 9)


def test_logits_are_taken_in_evaluation_mode_which_is_put_back() -> None:
    model = tiny_model("deepseek_v2", attention_dropout=0.5).train()
    tokens_BS = probe_tokens(model)
    first_BSV, second_BSV = logits_of(model, tokens_BS), logits_of(model, tokens_BS)
    assert torch.equal(first_BSV, second_BSV)
    assert first_BSV.shape == (4, 64, VOCAB_SIZE)
    assert not first_BSV.requires_grad
    assert model.training


def test_a_value_that_is_not_a_number_is_infinitely_far() -> None:
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    assert largest_difference(first, second) == 1.0
    assert largest_difference(first, torch.tensor([1.0, math.nan])) == math.inf
