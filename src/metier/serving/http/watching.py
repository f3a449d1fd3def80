"""`/health` for who starts the server again, and `/metrics` for who looks on."""

from __future__ import annotations

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from metier.serving.http.errors import json_response
from metier.serving.http.service import Service


def add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        if service.is_closing:
            return json_response({"status": "closing", "reason": "the server was told to stop"}, 503)
        status = service.engine.status()
        if not status.is_alive:
            # the first line: the rest may be a traceback
            reason = (status.error or "unknown").strip().splitlines()[0][:300]
            return json_response({"status": "dead", "reason": reason}, 503)
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
