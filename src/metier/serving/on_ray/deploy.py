"""What is deployed: the ingress and the replicas as Ray Serve's deployments, and why a deployment failed."""

from __future__ import annotations

import re
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, DeploymentActorConfig
from ray.serve.handle import DeploymentHandle

from metier.errors import ConfigError, ServingError
from metier.serving.on_ray.environment import ROUTING
from metier.serving.on_ray.ingress import KEEPER, Ingress, Keeper
from metier.serving.on_ray.ray_settings import RaySettings, ReplicaResources, read_autoscaling
from metier.serving.on_ray.replica import Replica
from metier.serving.on_ray.replica_state import ReplicaSettings

APP = "metier"
QUIET = {"log_level": "ERROR", "enable_access_log": False}
_MOST_REQUESTS = 64
"""That a replica answers at once, as many as an engine's batch holds. Where all that hold a delta have so many, further
requests for it go to another replica."""
_INGRESS_REQUESTS = 100_000
"""At once: the gate refuses them long before, in our own words."""
_DRAIN_SECONDS = 0.5
"""Between two looks of Ray Serve whether a replica that is to end has requests."""
_OURS = re.compile(r"^(?:ray\.exceptions\.\S+: )?metier\.errors\.\w+: (.*)\Z", re.MULTILINE | re.DOTALL)


def autoscaling_settings(given: list[str]) -> dict[str, Any]:
    """Ray Serve's settings for autoscaling from `KEY=VALUE` texts.

    Raises:
        ConfigError: Ray Serve does not have or take one.
    """
    values = read_autoscaling(given, list(AutoscalingConfig.model_fields))
    try:
        AutoscalingConfig(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"serve: --autoscaling: {where + ': ' if where else ''}{first['msg']}.") from error
    except ValueError as error:
        raise ConfigError(f"serve: --autoscaling: {error}.") from error
    return values


def deploy(replica: ReplicaSettings, settings: RaySettings, resources: ReplicaResources) -> DeploymentHandle:
    """Deploy a server, and wait until it answers.

    Returns:
        the ingress'.

    Raises:
        ServingError: a replica did not start.
    """
    engines = serve.deployment(
        name="Engine",
        max_ongoing_requests=_MOST_REQUESTS,
        ray_actor_options=_actor_options(resources),
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=replica.http.grace_seconds,
        graceful_shutdown_wait_loop_s=_DRAIN_SECONDS,
        **_scale(settings),
    )(Replica)
    keeper = DeploymentActorConfig(
        name=KEEPER,
        actor_class=ray.remote(Keeper),
        init_args=(replica.deltas,),
        actor_options={"num_cpus": 0},
    )
    ingress = serve.deployment(
        name="Ingress",
        max_ongoing_requests=_INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": ROUTING}},
        graceful_shutdown_timeout_s=replica.http.grace_seconds,
        graceful_shutdown_wait_loop_s=_DRAIN_SECONDS,
        deployment_actors=[keeper] if replica.http.allows_loading else None,
    )(serve.ingress()(Ingress))
    app = ingress.bind(engines.bind(replica), replica.base_name, replica.http, replica.deltas)
    try:
        return serve.run(app, name=APP, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:
        raise ServingError(f"serve: the deployment on Ray failed: {_reason(str(error))}") from error


def _scale(settings: RaySettings) -> dict[str, Any]:
    if settings.autoscaling is None:
        return {"num_replicas": settings.num_replicas}
    return {"autoscaling_config": dict(settings.autoscaling)}


def _actor_options(resources: ReplicaResources) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_cpus": resources.num_cpus,
        "num_gpus": resources.num_gpus,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(resources.num_cpus)}},
    }
    return options if resources.memory_bytes is None else {**options, "memory": resources.memory_bytes}


def _reason(message: str) -> str:
    """The error of ours in a message that has a traceback too; else the message's end."""
    found = _OURS.search(message)
    return found[1].strip() if found else message.strip()[-2000:]
