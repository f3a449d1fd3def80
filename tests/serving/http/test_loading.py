"""Deltas loaded and unloaded by requests, where that is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from metier.errors import BaseMismatchError, ServingError
from serving.fake_engine import FakeEngine
from serving.http.serving_app import chat, client_of
from serving.made_tokenizers import byte_level

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(byte_level())


@pytest.fixture
def app(engine: FakeEngine, tmp_path: Path) -> TestClient:
    folder = tmp_path / "deltas" / "tax"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    return client_of(engine, allows_loading=True, delta_dirs=(tmp_path / "deltas",))


@pytest.mark.parametrize(("path", "body"), [(LOAD, {"lora_name": "tax", "lora_path": "tax"}), (UNLOAD, {"lora_name": "law"})])  # fmt: skip
def test_loading_is_off_unless_allowed(engine: FakeEngine, path: str, body: dict[str, str]) -> None:
    response = client_of(engine).post(path, json=body)
    assert response.status_code == 403
    assert "Start it with --allow-loading" in response.json()["error"]["message"]
    assert (engine.names, engine.loaded) == (["law", "medicine"], [])


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_delta_that_was_loaded_answers(
    app: TestClient, engine: FakeEngine, tmp_path: Path, is_absolute: bool
) -> None:
    path = str(tmp_path / "deltas" / "tax") if is_absolute else "tax"
    response = app.post(LOAD, json={"lora_name": "tax", "lora_path": path, "pinned": True})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'tax' added successfully.")
    assert engine.loaded == [("tax", tmp_path / "deltas" / "tax", True)]
    answer = app.post("/v1/chat/completions", json=chat(model="tax")).json()
    assert answer["choices"][0]["message"]["content"] == "Answer of tax."


def test_a_delta_that_was_unloaded_is_not_found(app: TestClient) -> None:
    response = app.post(UNLOAD, json={"lora_name": "law", "lora_int_id": 1})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'law' removed successfully.")
    assert app.post("/v1/chat/completions", json=chat(model="law")).status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"lora_name": "tax", "lora_path": "../outside"}, "got '../outside', expected a folder inside one that"),
        ({"lora_name": "tax", "lora_path": "/etc"}, "got '/etc', expected a folder inside one that deltas may be"),
        ({"lora_name": "a/b", "lora_path": "tax"}, "got 'a/b' as a delta's name"),
        ({"lora_name": "org/base", "lora_path": "tax"}, "got 'org/base' as a delta's name"),
        ({"lora_name": "tax"}, "lora_path: it is missing"),
        ({"lora_name": "tax", "lora_pth": "tax"}, "lora_pth: unknown field. Did you mean 'lora_path'?"),
        ({"lora_name": "tax", "lora_path": "tax", "load_inplace": True}, "load_inplace: this server does not support"),
    ],
)
def test_a_delta_that_may_not_be_loaded_is_refused(
    app: TestClient, engine: FakeEngine, body: dict[str, Any], message: str
) -> None:
    response = app.post(LOAD, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)
    assert engine.loaded == []


@pytest.mark.parametrize("error", [BaseMismatchError("trained on another base"), ServingError("more than any budget")])
def test_what_the_engine_does_not_take_is_told(app: TestClient, engine: FakeEngine, error: Exception) -> None:
    engine.load_error = error
    response = app.post(LOAD, json={"lora_name": "tax", "lora_path": "tax"})
    assert (response.status_code, response.json()["error"]["message"]) == (400, str(error))


def test_unloading_what_is_not_served_is_not_found(app: TestClient) -> None:
    response = app.post(UNLOAD, json={"lora_name": "tax"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "lora_name"
