"""Banks of experts, and what all banks of a layer have in common."""

# T tokens, D hidden_size, F moe_intermediate_size, E experts of a bank, K top_k, P rows in virtual expert order
# U = 2F where experts are gated, else F

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from metier.methods.pairs import PairOrder

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

    def up(self, bank: ExpertBank) -> Tensor:
        """(E, D, U)"""
        return bank.up if self.is_transposed else bank.up.mT

    def down(self, bank: ExpertBank) -> Tensor:
        """(E, F, D)"""
        return bank.down if self.is_transposed else bank.down.mT

    def bounds(self, order: PairOrder, banks: list[ExpertBank]) -> list[tuple[int, ...]]:
        """For each bank the part of `order.bounds` that is its own."""
        ends = list(accumulate((bank.up.shape[0] for bank in banks), initial=0))
        return [order.bounds[ends[i] : ends[i + 1] + 1] for i in range(len(banks))]
