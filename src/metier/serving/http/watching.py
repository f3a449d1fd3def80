"""`/health` for who starts the server again, and `/metrics` for who looks on."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from metier.serving.http.errors import json_response
from metier.serving.http.front import Front
from metier.serving.http.metrics import Metrics


def add_health(app: FastAPI | APIRouter, front: Front) -> None:
    @app.get("/health")
    async def health() -> Response:
        if front.is_closing:
            return json_response({"status": "closing", "reason": "the server was told to stop"}, 503)
        status = front.engine.status()
        if not status.is_alive:
            # the first line: the rest may be a traceback
            reason = (status.error or "unknown").strip().splitlines()[0][:300]
            return json_response({"status": "dead", "reason": reason}, 503)
        return json_response({"status": "ok"})


def add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics")
    async def text() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
