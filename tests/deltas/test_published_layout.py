"""Names under which families publish single experts, as transformers' own conversion has them."""

from __future__ import annotations

import pytest
import torch

from metier.deltas.published_layout import published_matrices
from metier.models.moe import moe_layers
from tiny_models import tiny_model


def test_gate_and_up_are_parts_of_one_stacked_weight() -> None:
    model = tiny_model("mixtral")
    found = published_matrices(model, moe_layers(model)[1], "gate_up_proj")
    assert found is not None
    places = {matrix.name: (matrix.expert, matrix.rows) for matrix in found}
    start = "model.layers.1.block_sparse_moe.experts"
    assert places == {f"{start}.{e}.w1.weight": (e, slice(0, 24, 1)) for e in range(4)} | {
        f"{start}.{e}.w3.weight": (e, slice(24, 48, 1)) for e in range(4)
    }


@pytest.mark.parametrize("family", ["deepseek_v2", "nemotron_h"])
def test_without_its_weights_a_model_tells_the_same(family: str) -> None:
    model = tiny_model(family)
    layer = moe_layers(model)[0]
    name = layer.parameter_names()[0]
    want = published_matrices(model, layer, name)
    model = model.to("meta")
    assert published_matrices(model, moe_layers(model)[0], name) == want


def test_stacked_experts_have_no_single_matrices() -> None:
    model = tiny_model("gpt_oss")
    assert published_matrices(model, moe_layers(model)[0], "gate_up_proj") is None


def test_rows_that_alternate_keep_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    layer = moe_layers(model)[0]

    def interleaved(_: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (stacked,) = state.values()
        return {f"{e}.{part}": stacked[e, part::2] for e in range(8) for part in (0, 1)}

    monkeypatch.setattr("metier.deltas.published_layout.revert_weight_conversion", interleaved)
    found = published_matrices(model, layer, "gate_up_proj")
    assert found is not None
    assert [(m.name, m.expert, m.rows) for m in found[:2]] == [("0.0", 0, slice(0, 47, 2)), ("0.1", 0, slice(1, 48, 2))]


def test_rows_of_two_experts_in_one_tensor_are_no_single_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    joined = lambda _, state: {"pair": next(iter(state.values()))[:2].flatten(0, 1)}  # noqa: E731
    monkeypatch.setattr("metier.deltas.published_layout.revert_weight_conversion", joined)
    assert published_matrices(model, moe_layers(model)[0], "down_proj") is None
