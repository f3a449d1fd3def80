"""What LoRA experts change, as a function by itself: its gradients for weights that add up to anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metier.methods.mixlora.changes import LoraExpert, changes

SIZES = {"T": 5, "D": 3, "U": 4, "R": 2, "E": 3}


def matrices(num_ups: int, generator: torch.Generator) -> list[Tensor]:
    d, u, r = SIZES["D"], SIZES["U"], SIZES["R"]
    shapes = [(num_ups, r, d), (num_ups, u, r), (r, u), (d, r)] * SIZES["E"]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("num_ups", [1, 2])
def test_gradients_are_those_of_small_steps(num_ups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = matrices(num_ups, generator)
    hidden_TD, *ups_TU = (
        torch.randn(SIZES["T"], size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in (SIZES["D"], *[SIZES["U"]] * num_ups)
    )
    # expert 2 has no token
    ids_TK = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])
    weights_TK = torch.rand(SIZES["T"], 2, generator=generator, dtype=torch.float64).requires_grad_()

    def between(gate: Tensor, *up: Tensor) -> Tensor:
        return F.silu(gate) * up[0] if up else F.silu(gate)

    def run(hidden_TD: Tensor, weights_TK: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        ups, flat = rest[:num_ups], rest[num_ups:]
        experts = [LoraExpert(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
        return changes(hidden_TD, ids_TK, weights_TK, ups, between(*ups), experts=experts, between=between, scale=0.7)

    assert torch.autograd.gradcheck(run, (hidden_TD, weights_TK, *ups_TU, *flat))
