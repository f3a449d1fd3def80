"""The ingress' application: the gate, the page and what is known of all replicas; requests to be answered go on.

All but `/metrics` and the passing on is what `metier serve` has without Ray.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response

from metier.serving.http.errors import install_error_handlers
from metier.serving.http.gate import Gate
from metier.serving.http.loading import add_loading
from metier.serving.http.models import add_models
from metier.serving.http.page import add_page
from metier.serving.http.watching import add_health
from metier.serving.on_ray.forwarding import Forwarding
from metier.serving.on_ray.merged_metrics import merged_metrics
from metier.serving.on_ray.names import Names
from metier.serving.on_ray.ray_front import RayFront
from metier.serving.together import Together


def create_front_app(front: RayFront, names: Names, handle: DeploymentHandle) -> FastAPI:
    """An application that passes requests on to replicas.

    Args:
        front: what the endpoints serve.
        names: what is served.
        handle: of the replicas.
    """
    app = FastAPI(title="metier", openapi_url=None)
    # from the inside out: the gate is passed by each request that the page's one is made into
    app.add_middleware(Forwarding, front=front, handle=handle, names=names)
    app.add_middleware(Gate, front=front)
    app.add_middleware(Together)
    install_error_handlers(app)
    looking = APIRouter(dependencies=[Depends(front.engine.look)])
    add_models(looking, front)
    add_health(looking, front)
    app.include_router(looking)
    add_loading(app, front)
    add_page(app)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(merged_metrics(await front.engine.metrics()), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return app
