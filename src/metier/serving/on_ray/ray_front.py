"""What the ingress' endpoints serve."""

from __future__ import annotations

from dataclasses import dataclass

from metier.serving.http.settings import HttpSettings
from metier.serving.on_ray.replicas import Replicas


@dataclass
class RayFront:
    """A `Front`."""

    base_name: str
    settings: HttpSettings
    engine: Replicas
    is_closing: bool = False
    num_forwarded: int = 0
    """Requests that replicas are answering."""
