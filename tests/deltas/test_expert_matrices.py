"""Rows to single matrices and back: what a family computes with them is the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metier.deltas.expert_matrices import matrix_shapes, split_rows, stack_rows
from metier.models.moe import MoELayer, moe_layers
from tiny_models import tiny_model

FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral", "gpt_oss", "nemotron_h")
# float32, the same sums in another order
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def first_layer(family: str) -> MoELayer:
    layer = moe_layers(tiny_model(family))[0]
    with torch.no_grad():
        for index, name in enumerate(layer.parameter_names()):
            parameter = getattr(layer.experts, name)  # biases begin as zeros
            parameter.normal_(generator=torch.Generator().manual_seed(index))
    return layer


def rows_of(layer: MoELayer, ids: list[int]) -> dict[str, Tensor]:
    return {name: getattr(layer.experts, name).detach()[ids] for name in layer.parameter_names()}


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_have_the_shapes_of_linear_layers_and_go_back_to_the_bit(family: str) -> None:
    layer = first_layer(family)
    rows = rows_of(layer, [2, 0, 3])
    matrices = split_rows(layer, rows)
    assert {name: tuple(m.shape[1:]) for name, m in matrices.items()} == matrix_shapes(layer)
    back = stack_rows(layer, matrices)
    assert back.keys() == rows.keys()
    for name, tensor in rows.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].is_contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_compute_what_the_family_computes(family: str) -> None:
    """`down(act(gate(x)) * up(x))` of each, in each family's own variant of the gate."""
    layer = first_layer(family)
    matrices = split_rows(layer, rows_of(layer, [1]))
    x_TD = torch.randn(5, layer.hidden_size, generator=torch.Generator().manual_seed(9))

    def linear(name: str, x: Tensor) -> Tensor:
        bias = matrices.get(f"{name}.bias")
        return torch.nn.functional.linear(x, matrices[f"{name}.weight"][0], None if bias is None else bias[0])

    up_TF = linear("up_proj", x_TD)
    if family == "gpt_oss":
        limit, alpha = layer.experts.limit, layer.experts.alpha
        gate_TF = linear("gate_proj", x_TD).clamp(max=limit)
        inner_TF = (up_TF.clamp(-limit, limit) + 1) * gate_TF * torch.sigmoid(alpha * gate_TF)
    elif layer.has_gate:
        inner_TF = layer.experts.act_fn(linear("gate_proj", x_TD)) * up_TF
    else:
        inner_TF = layer.experts.act_fn(up_TF)
    ids_TK, weights_TK = torch.ones(5, 1, dtype=torch.int64), torch.ones(5, 1)
    with torch.no_grad():
        want_TD = layer.experts(x_TD, ids_TK, weights_TK)
    # by the largest output: terms of that size cancel out in the small ones, in an order that differs by machine
    scale = want_TD.abs().max()
    torch.testing.assert_close(linear("down_proj", inner_TF) / scale, want_TD / scale, **TOLERANCE)
