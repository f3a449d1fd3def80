"""`/v1/models`: the base and its deltas."""

from __future__ import annotations

import time

from fastapi import APIRouter, FastAPI
from starlette.responses import Response

from metier.errors import UnknownDeltaError
from metier.serving.contract import DeltaStatus
from metier.serving.http.errors import json_response
from metier.serving.http.front import Front
from metier.serving.http.shape import Json


def add_models(app: FastAPI | APIRouter, front: Front) -> None:
    started = int(time.time())

    def base() -> Json:
        return {**_card(front, front.base_name, started), "parent": None}

    def delta(status: DeltaStatus) -> Json:
        about = {
            "kind": status.kind,
            "tier": status.tier,
            "bytes": status.num_bytes,
            "is_pinned": status.is_pinned,
            "running": status.num_running,
        }
        return {**_card(front, status.name, status.created), "parent": front.base_name, "metier": about}

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [base(), *map(delta, front.engine.deltas())]})

    # a hub's id has a slash
    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name == front.base_name:
            return json_response(base())
        for status in front.engine.deltas():
            if status.name == name:
                return json_response(delta(status))
        raise UnknownDeltaError(f"model: got {name[:100]!r}, which is not served. GET /v1/models lists all.")


def _card(front: Front, name: str, created: int) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "metier",
        # not the folder, which is nothing to a client
        "root": name,
        "max_model_len": front.engine.max_length,
    }
