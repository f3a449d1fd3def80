"""The Ray cluster: joined where there is an address, else started on this machine; quiet, and left as it was found."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metier import __version__
from metier.errors import ConfigError, RunError
from metier.evaluation.comparison.on_ray.needs import Node, usable_nodes
from metier.evaluation.comparison.on_ray.on_node import look_at_node

LOST_RETRIES = 1
"""How often Ray runs a cell again whose worker or node was lost; one that crashes by itself is not run again."""
_OBJECT_STORE_BYTES = 128 << 20  # results are a few hundred KB; the rest is the cells'
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
_ANSWER_SECONDS = 10.0
_LOOK_SECONDS = 120.0


def check_installed() -> None:
    """Raise ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("compare: --on ray: Ray is not installed.\nInstall it with: pip install 'metier[ray]'")


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected; what was started for it ends with the context.

    Args:
        address: `HOST:PORT` of the cluster's head, or "auto" for one that runs on this machine; that of RAY_ADDRESS if
            not given, and where there is none either, a cluster on this machine.

    Raises:
        ConfigError: Ray is not installed.
        RunError: no cluster answers, or it does not let us in.
    """
    check_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # for ever, if nothing is said: a cell that is too large for its node would never end
    os.environ.setdefault("RAY_task_oom_retries", str(LOST_RETRIES))
    import ray

    if ray.is_initialized():  # by the program that calls us, which shuts it down too
        yield ray
        return
    _connect(ray, address or os.environ.get("RAY_ADDRESS") or None)
    try:
        yield ray
    finally:
        ray.shutdown()


def nodes_of(ray: Any) -> list[Node]:
    """The nodes that can run a cell now."""
    return usable_nodes(ray.nodes())


def check_nodes(ray: Any, nodes: list[Node], inputs: tuple[str, ...]) -> None:
    """Look at each node before a cell is sent to one.

    Args:
        inputs: paths that runs read.

    Raises:
        RunError: one has not what runs read, has no metier or another one, or does not answer.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(look_at_node)
    asked = {
        node: task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote(inputs)
        for node in nodes
    }
    for node, answer in asked.items():
        try:
            facts = ray.get(answer, timeout=_LOOK_SECONDS)
        except ray.exceptions.RayError as error:
            raise RunError(
                f"compare: node {node.name} cannot run a cell: {in_a_line(error)}\n"
                f"Every node needs Python, Ray and metier as they are here: pip install 'metier[ray]=={__version__}'."
            ) from error
        if facts.version != __version__:
            raise RunError(
                f"compare: node {node.name} has metier {facts.version}, expected {__version__} as here.\n"
                f"Install it there: pip install 'metier[ray]=={__version__}'."
            )
        if facts.missing:
            raise RunError(
                f"compare: node {node.name} has no {', '.join(facts.missing)}, which the comparison reads.\n"
                "Put it there under the same path on every node, or name a hub's id."
            )


def in_a_line(error: Exception) -> str:
    """What Ray says, in a line: the last one of a trace, else the first of what may be pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if any("Traceback" in line for line in lines) else lines[0]


def _connect(ray: Any, address: str | None) -> None:
    if address in (None, "local"):
        _start(ray)
    else:
        _check_it_answers(address)
        try:
            ray.init(address, **_QUIET)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise RunError(
                f"compare: the Ray cluster at {address} cannot be joined: {in_a_line(error)}\n"
                "Where it asks for a token, set RAY_AUTH_MODE=token; its Ray and Python have to be those that are here."
            ) from error
    # log_to_driver leaves out what workers say, not what Ray itself says of them: pages, between our lines of progress
    ray._private.worker._worker_logs_enabled = False


def _start(ray: Any) -> None:
    """A cluster of this machine, with what runs here have without Ray: all its cores, its memory, their priority."""
    from metier.memory.memory_limit import memory_limit_bytes  # with torch

    os.environ.setdefault("RAY_worker_niceness", "0")
    resources = {
        "num_cpus": os.cpu_count(),
        "_memory": memory_limit_bytes(),
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    for is_last in (False, True):
        try:
            ray.init("local", **resources, include_dashboard=False, **_QUIET)
        except Exception as error:  # Ray has no type for it; it waits 30 seconds, which a busy machine may exceed once
            if is_last:
                raise RunError(
                    f"compare: Ray cannot start on this machine: {in_a_line(error)}\n"
                    "Where the machine is busy, try again; what is done is not run again. Ray's logs are in /tmp/ray."
                ) from error
        else:
            return


def _check_it_answers(address: str | None) -> None:
    """Ray itself would try for more than five minutes."""
    host, _, port = str(address).rpartition("://")[2].rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise ConfigError(
            f"compare: the address of Ray: got {address!r}, expected HOST:PORT of the cluster's head, or auto."
        )
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"compare: no Ray cluster answers at {address} ({error}).\n"
            "Start one there (ray start --head), or leave --ray-address and RAY_ADDRESS out to run on this machine."
        ) from error
