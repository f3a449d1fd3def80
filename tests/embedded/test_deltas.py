"""The deltas that ship: small, of the model that ships, and without a trace of the machine that trained them."""

from __future__ import annotations

import json

import pytest

import metier
from metier import embedded
from metier.deltas.on_base import check_experts, check_fingerprint, check_tensors
from metier.deltas.read import read_delta

METHODS = {"synopsis": "ESFT", "translate": "EXPERT_LORA"}
MAX_BYTES = 5_000_000


@pytest.mark.parametrize(("name", "method"), METHODS.items())
def test_a_delta_is_whole_and_of_the_embedded_model(name: str, method: str) -> None:
    delta = read_delta(embedded.delta_path(name))
    model, _ = metier.load("embedded")
    assert delta.config.method == method
    assert {tensor.dtype for tensor in delta.tensors.values()} - {"I64"} == {"BF16"}
    check_fingerprint(delta, model, "embedded")
    check_experts(delta, model, "embedded")
    check_tensors(delta, model)


@pytest.mark.parametrize("name", METHODS)
def test_a_delta_calls_its_base_by_name(name: str) -> None:
    folder = embedded.delta_path(name)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "embedded"
    assert "base_model: embedded" in (folder / "README.md").read_text()


def test_all_deltas_together_are_small() -> None:
    files = [path for name in METHODS for path in embedded.delta_path(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
