"""One cell on a node of the cluster, as a Ray task runs it: in a process and a folder of its own, which comes back.

The task starts the very process that a cell has on one machine and waits for it, rather than to train in Ray's worker:
its peak memory is the cell's own, its end says what killed it, and the worker, which takes next to nothing, lives to
tell. Files come back as bytes, so that nodes share no disk. Free of Ray.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metier import __version__
from metier.evaluation.comparison.cells import LOG, SPEC
from metier.evaluation.comparison.child import start_child, stop_child, why_failed
from metier.evaluation.comparison.on_ray.files import read_files, write_files

_POLL_SECONDS = 0.1
_STAYS = ("checkpoints", "*.safetensors")
"""Of a cell's folder: what is large, and of no use once its result is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A cell to run."""

    spec: Mapping[str, Any]
    runner: str
    """The module that runs it."""
    num_threads: int
    cwd: str
    """Of the process that gives the order: where relative paths count from."""
    inputs: tuple[str, ...]
    """Paths that the run reads, which have to be on the node."""
    until: float | None
    """Seconds since the epoch, after which it is not begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of an order."""

    reason: str = ""
    """Why it failed; "" where the result is among the files."""
    is_begun: bool = True
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Of the cell's folder: all that a run on one machine leaves; of one that failed, what it was and its log."""
    profiles: Mapping[str, bytes] = field(default_factory=dict)
    """Of the tasks' profiles: those that the run made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What has to be right on a node before a cell is sent to it."""

    host: str
    version: str
    """Of metier."""
    missing: tuple[str, ...]
    """Inputs that are not there."""


def look_at_node(inputs: tuple[str, ...]) -> NodeFacts:
    """What the node that this runs on has."""
    missing = tuple(path for path in inputs if not Path(path).expanduser().exists())
    return NodeFacts(host=socket.gethostname(), version=__version__, missing=missing)


def carry_out(order: Order, profiles: Mapping[str, bytes]) -> Outcome:
    """Run a cell.

    Args:
        order: what to run.
        profiles: files of the tasks' profiles that are known already.
    """
    if order.until is not None and time.time() >= order.until:
        return Outcome(is_begun=False)
    node = look_at_node(order.inputs)
    if node.missing:
        return Outcome(reason=f"node {node.host} has no {', '.join(node.missing)}", files={LOG: b""})
    with tempfile.TemporaryDirectory(prefix="metier-cell-") as place:
        folder, known = Path(place) / "cell", Path(place) / "profiles"
        write_files(known, profiles)
        reason = _run(order, folder, {**order.spec, "profiles": str(known)})
        if reason:
            return Outcome(reason=reason, files={name: (folder / name).read_bytes() for name in (SPEC, LOG)})
        made = {name: content for name, content in read_files(known).items() if name not in profiles}
        return Outcome(files=read_files(folder, without=_STAYS), profiles=made)


def _run(order: Order, folder: Path, spec: Mapping[str, Any]) -> str:
    """Why it failed; "" where it did not."""
    cwd = order.cwd if os.path.isdir(order.cwd) else None
    process = start_child(folder, spec, num_threads=order.num_threads, runner=order.runner, cwd=cwd)
    try:
        # not wait(): a cancelled task is interrupted between Python's steps alone
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
        return why_failed(folder, process.returncode)
    finally:
        stop_child(process)
