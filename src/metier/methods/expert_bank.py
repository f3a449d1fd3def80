"""Banks of experts, and what all banks of a layer have in common."""

# T tokens, D hidden_size, F moe_intermediate_size, E experts of a bank, K top_k, P rows in virtual expert order
# U = 2F where experts are gated, else F

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from metier.memory.frozen_weight import FrozenWeight
from metier.methods.pairs import PairOrder

Weights = Tensor | Sequence[Tensor]
"""One matrix an expert, stacked or wherever each lies."""

Activation = Callable[[Tensor], Tensor]
"""(P, U) → (P, F), row by row: the gate of the family, or its plain activation function."""


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """A stack of experts: `up` then `down`, each with its bias where the family has biases."""

    up: Tensor
    """(E, U, D), or (E, D, U) where transposed."""
    down: Tensor
    """(E, D, F), or (E, F, D) where transposed."""
    up_bias: Tensor | None = None
    """(E, U)"""
    down_bias: Tensor | None = None
    """(E, D)"""

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.up, self.down, self.up_bias, self.down_bias)

    def to(self, dtype: torch.dtype) -> ExpertBank:
        up_bias = None if self.up_bias is None else self.up_bias.detach().to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.detach().to(dtype)
        return ExpertBank(self.up.detach().to(dtype), self.down.detach().to(dtype), up_bias, down_bias)


class LowRank(Protocol):
    """What a bank adds to its weights, group by group, without forming their sum (`low_rank.py`).

    Each method gets the rows of the groups `first` to `last - 1`, and writes into its last argument or keeps
    gradients to itself.
    """

    def add_up(self, first: int, last: int, rows_PD: Tensor, up_PU: Tensor) -> None: ...

    def add_down(self, first: int, last: int, inner_PF: Tensor, out_PD: Tensor) -> None: ...

    def add_inner_gradient(self, first: int, last: int, grad_PD: Tensor, grad_inner_PF: Tensor) -> None: ...

    def add_row_gradient(self, first: int, last: int, grad_up_PU: Tensor, grad_rows_PD: Tensor) -> None: ...

    def keep_gradients(
        self, first: int, last: int, rows_PD: Tensor, grad_up_PU: Tensor, inner_PF: Tensor, grad_PD: Tensor
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class ExpertsLayer:
    """What all banks of a layer have in common, and the base."""

    base: ExpertBank
    activation: Activation
    is_transposed: bool
    output_norm: Activation | None = None
    """(P, D) → (P, D), row by row: what some families do to each expert's output; frozen."""

    def up(self, bank: ExpertBank, first: int, last: int, cut: Sequence[int]) -> Weights:
        """(D, U) of each of the experts `first` to `last - 1`, whose rows are bounded by `cut`."""
        return _weights(bank.up if self.is_transposed else bank.up.mT, first, last, cut)

    def up_back(self, bank: ExpertBank, first: int, last: int, cut: Sequence[int]) -> Weights:
        """(U, D) of each: the way back."""
        return _weights(bank.up.mT if self.is_transposed else bank.up, first, last, cut)

    def down(self, bank: ExpertBank, first: int, last: int, cut: Sequence[int]) -> Weights:
        """(F, D) of each."""
        return _weights(bank.down if self.is_transposed else bank.down.mT, first, last, cut)

    def down_back(self, bank: ExpertBank, first: int, last: int, cut: Sequence[int]) -> Weights:
        """(D, F) of each: the way back."""
        return _weights(bank.down.mT if self.is_transposed else bank.down, first, last, cut)

    def up_size(self, bank: ExpertBank) -> int:
        """U"""
        return bank.up.shape[2 if self.is_transposed else 1]

    def bounds(self, order: PairOrder, banks: list[ExpertBank]) -> list[tuple[int, ...]]:
        """For each bank the part of `order.bounds` that is its own."""
        ends = list(accumulate((bank.up.shape[0] for bank in banks), initial=0))
        return [order.bounds[ends[i] : ends[i + 1] + 1] for i in range(len(banks))]


def _weights(stack: Tensor, first: int, last: int, cut: Sequence[int]) -> Weights:
    """Those of a stack that are worked on at once. Of a stack that lives elsewhere only experts with rows are read."""
    if not isinstance(stack, FrozenWeight):
        return stack[first:last]
    used = [first + group for group, (start, end) in enumerate(pairwise(cut)) if end > start] or [first]
    read = dict(zip(used, stack.some(used), strict=True))
    # nobody looks at the weight of an expert without rows
    return [read.get(expert, read[used[0]]) for expert in range(first, last)]
