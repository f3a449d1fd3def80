"""What a replica is started with, and what it says of itself; torch-free, since the ingress reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metier.serving.contract import DeltaStatus, EngineStatus
from metier.serving.http.settings import HttpSettings
from metier.serving.on_ray.names import NamedDelta


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSettings:
    model: str
    """A folder, a hub id, or "embedded", as every machine of the cluster has it."""
    base_name: str
    dtype: str
    engine: Mapping[str, Any]
    """Of `EngineSettings`, what is not as by default."""
    http: HttpSettings
    """Of the whole server. The ingress keeps to keys, hosts and times; a replica to what an answer may be."""
    deltas: tuple[NamedDelta, ...]
    """In service from the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaState:
    replica: str
    """Ray Serve's id of it."""
    engine: EngineStatus
    deltas: tuple[DeltaStatus, ...]
    max_length: int
    capacity: int
    """How many deltas it holds at once."""
    memory: str
    """How its memory is parted, in words."""
    worst_difference: float | None
    """Of the self-tests at the start; None where there were none."""
