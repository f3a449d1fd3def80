"""/v1/models: the base and its deltas."""

from __future__ import annotations

import openai
import pytest

from serving.http.serving_app import BASE


def test_the_base_and_its_deltas_are_listed(client: openai.OpenAI) -> None:
    models = [model.model_dump() for model in client.models.list()]
    assert [(m["id"], m["parent"], m["root"]) for m in models] == [
        (BASE, None, BASE),
        ("law", BASE, "law"),
        ("medicine", BASE, "medicine"),
    ]
    assert all(m["object"] == "model" and m["owned_by"] == "metier" and m["max_model_len"] == 512 for m in models)
    assert models[1]["created"] == 1_700_000_000
    assert models[1]["metier"] == {"kind": "esft", "tier": "host", "bytes": 1000, "is_pinned": False, "running": 0}


@pytest.mark.parametrize("name", [BASE, "law"])
def test_one_model_is_as_in_the_list(client: openai.OpenAI, name: str) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert client.models.retrieve(name).model_dump() == listed[name]


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="got 'lwa', which is not served"):
        client.models.retrieve("lwa")
