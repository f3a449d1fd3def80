"""What a profile runs a model on, batch by batch: full sequences, or the pairs of an encoder-decoder."""

# N sequences or pairs, B of them in a batch, S tokens of one, T tokens of a reply

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metier.data.pairs import Pair, PairCollator

NOT_COUNTED = -1
"""The group of a token that is padding."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass."""

    inputs: dict[str, Tensor]
    """The model's keyword arguments."""
    is_token_BT: Tensor
    """bool: which places the decoder's layers count; False for padding."""
    is_encoder_token_BS: Tensor | None
    """The same for an encoder's layers; None where the model only decodes."""


class Inputs(Protocol):
    """Sequences or pairs in a fixed order."""

    @property
    def num_tokens_N(self) -> Tensor:
        """int64, (num_sequences,): tokens of each, an encoder's and its decoder's together."""

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest."""

    def batch(self, start: int, end: int) -> Batch:
        """Those from `start` to before `end`."""


@dataclass(frozen=True, slots=True)
class FullSequences:
    """Token ids without padding, int64, (num_sequences, sequence_length)."""

    ids_NS: Tensor

    @property
    def num_tokens_N(self) -> Tensor:
        return torch.full((len(self.ids_NS),), self.sequence_length)

    @property
    def sequence_length(self) -> int:
        return self.ids_NS.shape[1]

    def batch(self, start: int, end: int) -> Batch:
        ids_BS = self.ids_NS[start:end]
        mask_BS = torch.ones_like(ids_BS)
        return Batch({"input_ids": ids_BS, "attention_mask": mask_BS}, mask_BS.bool(), None)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Prompts for the encoder and replies for the decoder, padded as in training."""

    pairs: Sequence[Pair]
    collator: PairCollator

    @property
    def num_tokens_N(self) -> Tensor:
        return torch.tensor([pair.num_tokens for pair in self.pairs], dtype=torch.int64)

    @property
    def sequence_length(self) -> int:
        return max((pair.length for pair in self.pairs), default=0)

    def batch(self, start: int, end: int) -> Batch:
        inputs = self.collator(self.pairs[start:end])
        del inputs["labels"]
        return Batch(inputs, inputs["decoder_attention_mask"].bool(), inputs["attention_mask"].bool())
