"""A small fixed batch of tokens, and how near two models' logits on it are."""

# B sequences, S tokens of one, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from metier.models.encoder_decoder import is_encoder_decoder

NUM_SEQUENCES = 4
NUM_TOKENS = 64
"""In one sequence; fewer where the model has fewer positions."""
_SEED = 20240701

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference of two logits that counts as the same, as a share of the largest logit: some units in the last
place of the dtype, for the same sums formed in another order in each of some dozen layers."""


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """Random token ids of the model's vocabulary, (B, S) int64 on the CPU, always the same for the same sizes."""
    config = model.config.get_text_config()
    length = min(NUM_TOKENS, getattr(config, "max_position_embeddings", None) or NUM_TOKENS)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(config.vocab_size, (NUM_SEQUENCES, length), generator=generator)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens_BS: Tensor) -> Tensor:
    """(B, S, V) in the model's dtype, on the CPU; the model is in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        tokens_BS = tokens_BS.to(next(model.parameters()).device)
        # an encoder-decoder reads them on both sides
        extra = {"decoder_input_ids": tokens_BS} if is_encoder_decoder(model) else {}
        logits_BSV: Tensor = model(input_ids=tokens_BS, use_cache=False, **extra).logits
    finally:
        model.train(was_training)
    return logits_BSV.cpu()


def largest_difference(first_BSV: Tensor, second_BSV: Tensor) -> float:
    """Of two logits; infinite where one of the two is not a number."""
    difference = (first_BSV.double() - second_BSV.double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())
