"""How a server on Ray is deployed: how many replicas, where, and with what."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from metier.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RaySettings:
    num_replicas: int | None
    """None where Ray Serve scales them."""
    autoscaling: Mapping[str, Any] | None = None
    """Ray Serve's own settings for that."""
    address: str | None = None
    """Of a Ray cluster; None for one on this machine alone, which ends with the server."""
    cpus_per_replica: int | None = None
    """Cores, and threads that a replica computes with; None for an equal share of this machine's, or 1 on a cluster."""

    def __post_init__(self) -> None:
        if (self.num_replicas is None) == (self.autoscaling is None):
            raise ConfigError(
                "serve: got --replicas and --autoscaling, expected one of them. With --autoscaling give min_replicas, "
                "max_replicas and initial_replicas."
            )
        for name, value in (("replicas", self.num_replicas), ("replica-cpus", self.cpus_per_replica)):
            if value is not None and value < 1:
                raise ConfigError(f"serve: --{name}: got {value}, expected at least 1.")

    @property
    def most_replicas(self) -> int:
        if self.num_replicas is not None:
            return self.num_replicas
        assert self.autoscaling is not None, "checked above"
        return int(self.autoscaling.get("max_replicas", 1))


@dataclass(frozen=True, slots=True)
class ReplicaResources:
    """What Ray reserves for a replica."""

    num_cpus: int
    num_gpus: int
    memory_bytes: int | None
    """Of the host; None where the model is on a GPU of its own."""


def replica_resources(
    settings: RaySettings, cluster: Mapping[str, float], *, device_memory_bytes: int | None
) -> ReplicaResources:
    """Args:
        settings: of the deployment.
        cluster: all of its resources, as Ray says them.
        device_memory_bytes: what one replica may take; None for what there is.

    Raises:
        ConfigError: that has to be given.
    """
    is_local = settings.address is None
    share = max(1, int(cluster.get("CPU", 1)) // settings.most_replicas) if is_local else 1
    num_cpus = settings.cpus_per_replica or share
    if cluster.get("GPU", 0) >= 1:
        return ReplicaResources(num_cpus, 1, None)
    if device_memory_bytes is None and not is_local:
        raise ConfigError(
            "serve: --ray-address needs --device-memory too, such as 24GiB: what one replica may take, since several "
            "may come to run on one machine."
        )
    memory = device_memory_bytes or int(cluster["memory"]) // settings.most_replicas
    return ReplicaResources(num_cpus, 0, memory)


def read_autoscaling(given: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Settings as a command line has them, `KEY=VALUE`.

    Args:
        given: as they are.
        keys: that there are.

    Raises:
        ConfigError: it is no such text; or no such key, with the nearest one.
    """
    values: dict[str, Any] = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not (key and sign and value):
            raise ConfigError(f"serve: --autoscaling: got {text!r}, expected KEY=VALUE, such as max_replicas=4.")
        if key not in keys:
            nearest = difflib.get_close_matches(key, keys, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Ray Serve has {', '.join(sorted(keys))}."
            raise ConfigError(f"serve: --autoscaling: got {key!r}, which Ray Serve does not have.{hint}")
        if key in values:
            raise ConfigError(f"serve: --autoscaling: got {key!r} twice, expected each key once.")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"serve: --autoscaling: {key}: got {value!r}, which is no value.") from error
    return values
