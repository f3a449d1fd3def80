"""A LoRA's change is for the rows of its own delta's tokens, whichever of them a layer sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metier.serving.linears import LinearLora, ServedLinear
from metier.serving.step import NO_DELTA, make_step, running


@pytest.fixture
def layer() -> ServedLinear:
    torch.manual_seed(0)
    served = ServedLinear(nn.Linear(6, 4))
    served.loras = {
        1: LinearLora(torch.randn(2, 6), torch.randn(4, 2)),
        2: LinearLora(torch.ones(1, 6), torch.ones(4, 1)),
    }
    return served


def alone(layer: ServedLinear, row: Tensor, number: int) -> Tensor:
    out: Tensor = layer.base_layer(row)
    lora = layer.loras.get(number)
    return out if lora is None else out + row @ lora.a_RI.t() @ lora.b_OR.t()


def check(layer: ServedLinear, inputs: Tensor, numbers: list[int]) -> None:
    out = layer(inputs).flatten(0, -2)
    want = torch.stack([alone(layer, row, n) for row, n in zip(inputs.flatten(0, -2), numbers, strict=True)])
    assert torch.allclose(out, want, atol=1e-6)


@torch.no_grad()
def test_every_token_has_its_own_delta(layer: ServedLinear) -> None:
    with running(make_step([(1, 2), (NO_DELTA, 1), (2, 1), (3, 1)])):
        check(layer, torch.randn(1, 5, 6), [1, 1, NO_DELTA, 2, 3])


@torch.no_grad()
def test_an_output_layer_sees_the_last_tokens_alone(layer: ServedLinear) -> None:
    with running(make_step([(1, 2), (NO_DELTA, 3), (2, 1)], kept=[1, NO_DELTA, 2])):
        check(layer, torch.randn(1, 3, 6), [1, NO_DELTA, 2])
        check(layer, torch.randn(1, 6, 6), [1, 1, NO_DELTA, NO_DELTA, NO_DELTA, 2])


@torch.no_grad()
def test_a_layer_of_each_head_sees_rows_for_each_token(layer: ServedLinear) -> None:
    with running(make_step([(1, 1), (2, 2)], kept=[1, 2])):
        check(layer, torch.randn(1, 3, 2, 6), [1, 1, 2, 2, 2, 2])


@torch.no_grad()
def test_rows_that_are_nobodys_are_no_guess(layer: ServedLinear) -> None:
    with (
        running(make_step([(1, 2), (2, 3)])),
        pytest.raises(AssertionError, match="got 4 rows, expected a multiple of 5"),
    ):
        layer(torch.randn(1, 4, 6))


def test_the_base_layers_weight_is_shown(layer: ServedLinear) -> None:
    assert layer.weight is layer.base_layer.weight
