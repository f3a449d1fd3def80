"""Serve on a Ray cluster until a signal comes, and end it gracefully.

On SIGTERM or SIGINT new requests are refused with 503 while the running ones finish, for `grace_seconds` at most; a
second signal stops at once. Ray is kept quiet: no dashboard, no usage statistics, errors alone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import ray
from ray import serve

from metier.errors import ConfigError, ServingError
from metier.serving.on_ray.deploy import APP, QUIET, deploy
from metier.serving.on_ray.ray_settings import RaySettings, replica_resources
from metier.serving.on_ray.replica_state import ReplicaSettings, ReplicaState

_OBJECT_STORE_BYTES = 256 << 20
"""Of shared memory on a cluster of our own; requests and answers hardly use it."""
_ANSWER_SECONDS = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve_on_ray(
    replica: ReplicaSettings,
    settings: RaySettings,
    *,
    host: str,
    port: int,
    on_start: Callable[[list[ReplicaState]], None],
) -> None:
    """Serve until a signal.

    Args:
        replica: what each replica is started with.
        settings: of the deployment.
        host: address at which the head of the cluster listens.
        port: of it.
        on_start: called once with the replicas' own words, when they answer.

    Raises:
        ConfigError: as `replica_resources`.
        ServingError: the cluster is not there, serves something else, or a replica did not start.
    """
    with _connected(settings), _serving(host, port, is_own=settings.address is None):
        given = replica.engine.get("device_memory_bytes")
        resources = replica_resources(settings, ray.cluster_resources(), device_memory_bytes=given)
        if resources.memory_bytes is not None:
            replica = replace(replica, engine={**replica.engine, "device_memory_bytes": resources.memory_bytes})
        ingress = deploy(replica, settings, resources)
        states = ingress.states.remote().result()
        with _signals() as told_to_stop:
            on_start(states)
            told_to_stop.wait()
            ingress.close.remote().result()


@contextmanager
def _connected(settings: RaySettings) -> Iterator[None]:
    """To the cluster that is named, or to one of our own until the block is over."""
    quiet = {"logging_level": logging.ERROR, "log_to_driver": True}
    own = {
        "num_cpus": max(os.cpu_count() or 1, settings.most_replicas * (settings.cpus_per_replica or 1)),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    if settings.address is not None:
        _check_that_it_answers(settings.address)
    try:
        if settings.address is None:
            ray.init("local", **own, **quiet)
        else:
            ray.init(settings.address, **quiet)
    except Exception as error:  # Ray raises no kind of its own where its processes do not start
        raise ServingError(_not_there(settings.address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_that_it_answers(address: str) -> None:
    """Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"serve: --ray-address: got {address!r}, expected HOST:PORT of a cluster's head, or auto.")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ServingError(_not_there(address, error)) from error


def _not_there(address: str | None, error: Exception) -> str:
    if address is None:
        return f"serve: Ray did not start on this machine: {error}\nTry again; it waits for itself for 30 s at most."
    return (
        f"serve: --ray-address: got {address!r}, where no Ray cluster can be joined: {error}\n"
        "Start one there (ray start --head), with the Python and the Ray that are here, or leave it out."
    )


@contextmanager
def _serving(host: str, port: int, *, is_own: bool) -> Iterator[None]:
    """Ray Serve, listening there; what it serves is taken away after the block."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    others = sorted(set(serve.status().applications) - {APP})
    if others:
        raise ServingError(
            f"serve: this cluster's Ray Serve has {', '.join(others)}, and listens where that was told to.\n"
            "Take it away by `serve shutdown`, or give another cluster."
        )
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=QUIET)
    try:
        yield
    except SystemExit:
        if not is_own:
            serve.delete(APP, _blocking=False)
        raise
    except BaseException:
        if not is_own:
            serve.shutdown()
        raise
    # a cluster of our own ends as a whole, once the last bytes are out
    if is_own:
        serve.delete(APP)
    else:
        serve.shutdown()


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first signal sets; the second one ends the process."""
    told = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if told.is_set():
            sys.exit(1)
        told.set()

    former = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield told
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
