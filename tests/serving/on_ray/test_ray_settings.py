"""How many replicas with what, and Ray Serve's own settings as a command line has them."""

from __future__ import annotations

import pytest

from metier.errors import ConfigError
from metier.serving.on_ray.ray_settings import RaySettings, ReplicaResources, read_autoscaling, replica_resources

KEYS = ["min_replicas", "max_replicas", "target_ongoing_requests"]
MACHINE = {"CPU": 8.0, "memory": 32e9}


def test_values_are_read_as_what_they_are() -> None:
    given = ["max_replicas=4", "target_ongoing_requests=1.5"]
    assert read_autoscaling(given, KEYS) == {"max_replicas": 4, "target_ongoing_requests": 1.5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["max_replica=4"], r"got 'max_replica', which Ray Serve does not have\. Did you mean 'max_replicas'\?"),
        (
            ["colour=4"],
            r"got 'colour', which Ray Serve does not have\. Ray Serve has max_replicas, min_replicas, target",
        ),
        (["max_replicas"], r"got 'max_replicas', expected KEY=VALUE"),
        (["max_replicas="], r"got 'max_replicas=', expected KEY=VALUE"),
        (["max_replicas=1", "max_replicas=2"], r"got 'max_replicas' twice"),
        (["max_replicas={"], r"max_replicas: got '\{', which is no value"),
    ],
)
def test_what_is_no_setting_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"serve: --autoscaling: {message}"):
        read_autoscaling(given, KEYS)


def test_replicas_are_a_number_or_scaled() -> None:
    assert RaySettings(num_replicas=3).most_replicas == 3
    assert RaySettings(num_replicas=None, autoscaling={"max_replicas": 5}).most_replicas == 5
    for both in ({"num_replicas": 2, "autoscaling": {"max_replicas": 5}}, {"num_replicas": None}):
        with pytest.raises(ConfigError, match="got --replicas and --autoscaling, expected one of them"):
            RaySettings(**both)


@pytest.mark.parametrize(("option", "value"), [("num_replicas", 0), ("cpus_per_replica", -1)])
def test_less_than_one_is_refused(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"got {value}, expected at least 1"):
        RaySettings(**{"num_replicas": 1, option: value})


def test_replicas_share_a_machine_of_their_own() -> None:
    resources = replica_resources(RaySettings(num_replicas=4), MACHINE, device_memory_bytes=None)
    assert resources == ReplicaResources(num_cpus=2, num_gpus=0, memory_bytes=8_000_000_000)
    given = RaySettings(num_replicas=4, cpus_per_replica=1)
    assert replica_resources(given, MACHINE, device_memory_bytes=10**9) == ReplicaResources(1, 0, 10**9)
    assert replica_resources(RaySettings(num_replicas=9), MACHINE, device_memory_bytes=1).num_cpus == 1


def test_each_replica_has_a_gpu_where_there_are_any() -> None:
    resources = replica_resources(RaySettings(num_replicas=4), {**MACHINE, "GPU": 4.0}, device_memory_bytes=None)
    assert resources == ReplicaResources(num_cpus=2, num_gpus=1, memory_bytes=None)


def test_on_a_cluster_without_gpus_memory_has_to_be_given() -> None:
    settings = RaySettings(num_replicas=2, address="10.0.0.1:6379")
    with pytest.raises(ConfigError, match="--ray-address needs --device-memory too"):
        replica_resources(settings, MACHINE, device_memory_bytes=None)
    assert replica_resources(settings, MACHINE, device_memory_bytes=5) == ReplicaResources(1, 0, 5)
