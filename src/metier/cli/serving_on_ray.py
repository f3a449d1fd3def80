"""`metier serve --on ray`: its own options, and what it says once replicas answer."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from metier.cli.serving_asked import Asked, self_test_line

if TYPE_CHECKING:
    from metier.serving.on_ray.ray_settings import RaySettings
    from metier.serving.on_ray.replica_state import ReplicaState


def ray_settings(
    on: str, *, replicas: int | None, address: str | None, autoscaling: Sequence[str], cpus: int | None
) -> RaySettings | None:
    """How to deploy on Ray; None for a server without it.

    Raises:
        ConfigError: options that do not go together, or that Ray Serve does not take.
        ServingError: Ray is not installed.
    """
    from metier.errors import ConfigError, ServingError

    given = {"--replicas": replicas, "--ray-address": address, "--autoscaling": autoscaling, "--replica-cpus": cpus}
    if on == "local":
        alone = [option for option, value in given.items() if value]
        if alone:
            raise ConfigError(f"serve: {alone[0]} goes with --on ray alone. Leave it out, or give --on ray.")
        return None
    if on != "ray":
        raise ConfigError(f"serve: --on: got {on!r}, expected local or ray.")
    address = address or os.environ.get("RAY_ADDRESS") or None
    if importlib.util.find_spec("ray") is None:
        raise ServingError("serve: --on ray: Ray is not installed. Install it: pip install 'metier[ray]'")
    from metier.serving.on_ray.environment import set_environment

    set_environment(is_own_cluster=address is None)
    from metier.serving.on_ray.deploy import autoscaling_settings
    from metier.serving.on_ray.ray_settings import RaySettings

    return RaySettings(
        num_replicas=replicas or (None if autoscaling else 1),
        autoscaling=autoscaling_settings(list(autoscaling)) if autoscaling else None,
        address=address,
        cpus_per_replica=cpus,
    )


def serve_on_ray(asked: Asked, settings: RaySettings) -> None:
    """Serve until a signal. Folders are those of every machine of the cluster."""
    from metier.serving.on_ray import cluster
    from metier.serving.on_ray.names import NamedDelta
    from metier.serving.on_ray.replica_state import ReplicaSettings

    port = _port(asked.host, asked.port, settings.address)
    since_ns = time.time_ns()
    folder = Path(asked.model).expanduser()
    replica = ReplicaSettings(
        model=str(folder.resolve()) if folder.is_dir() else asked.model,
        base_name=asked.base_name,
        dtype=asked.dtype,
        engine=asked.options,
        http=replace(asked.http, delta_dirs=tuple(each.resolve() for each in asked.http.delta_dirs)),
        deltas=tuple(NamedDelta(name, folder.resolve(), since_ns) for name, folder in asked.deltas.items()),
    )
    host = f"[{asked.host}]" if ":" in asked.host else asked.host

    def say(states: list[ReplicaState]) -> None:
        num_deltas, first = len(asked.deltas), states[0]
        typer.echo(f"Memory of each replica ({len(states)}): {first.memory}.")
        if num_deltas:
            typer.echo(f"Each holds {min(first.capacity, num_deltas)} of {num_deltas} deltas at once.")
        if first.worst_difference is not None:
            typer.echo(self_test_line(num_deltas, max(state.worst_difference or 0.0 for state in states)))
        typer.echo(f"Serving at http://{host}:{port} on Ray: {asked.served}.")

    cluster.serve_on_ray(replica, settings, host=asked.host, port=port, on_start=say)


def _port(host: str, port: int, address: str | None) -> int:
    """The port, which is free where it is on this machine."""
    from metier.errors import ConfigError
    from metier.serving.http.server import bound_socket

    if address is not None:
        if port == 0:
            raise ConfigError(
                "serve: --port: got 0, expected the port that the head of the Ray cluster is to listen at."
            )
        return port
    with bound_socket(host, port) as bound:
        return int(bound.getsockname()[1])
