"""What the gate, and the endpoints that do not generate, know of what is behind them: one engine, or several."""

from __future__ import annotations

from typing import Protocol

from metier.errors import UnknownDeltaError
from metier.serving.contract import DeltaService
from metier.serving.http.settings import HttpSettings


class Front(Protocol):
    base_name: str
    """The `model` of requests to the base itself."""
    settings: HttpSettings
    is_closing: bool
    """New requests are refused."""

    @property
    def engine(self) -> DeltaService: ...


def delta_named(model: str, base_name: str, names: list[str]) -> str | None:
    """The delta that a request's `model` names; None for the base.

    Args:
        model: as the request has it.
        base_name: of the base.
        names: of the deltas that are served.

    Raises:
        UnknownDeltaError: there is no such model.
    """
    if model == base_name:
        return None
    if model not in names:
        shown = ", ".join([base_name, *names][:20])
        raise UnknownDeltaError(f"model: got {model[:100]!r}, expected one of {shown}. GET /v1/models lists all.")
    return model
