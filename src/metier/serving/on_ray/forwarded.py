"""A request on its way from the ingress to a replica, and which model its body names."""

from __future__ import annotations

import json
from dataclasses import dataclass

from metier.serving.on_ray.names import NamedDelta


@dataclass(frozen=True, slots=True)
class Forwarded:
    path: str
    content_type: str
    body: bytes
    delta: NamedDelta | None
    """None for the base, and where the body names no model: then any replica says what is wrong with it."""


def model_in(body: bytes) -> str | None:
    """The model that a request's body names; None where it is not one that a body could be answered with."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    model = values.get("model") if isinstance(values, dict) else None
    return model if isinstance(model, str) else None
