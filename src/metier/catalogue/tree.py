"""All methods by name, in the order of the survey's tree."""

from __future__ import annotations

import difflib

from metier.catalogue import additive, hybrid, low_rank, memory_efficient, reparameterized, selective
from metier.catalogue.method import Method
from metier.errors import ConfigError

KINDS = ("Additive", "Selective", "Reparameterized", "Hybrid", "Memory-efficient", "Baselines")

_PARTS = (additive, selective, low_rank, reparameterized, hybrid, memory_efficient)
METHODS: dict[str, Method] = {method.name: method for part in _PARTS for method in part.METHODS}

REFUSED = {
    "xlora": "an adapter that is saved and loaded gives other logits than it had. Use mixlora or molora.",
    **dict.fromkeys(
        ("eva", "corda", "lora_ga", "loftq"),
        "its first values need calls of PEFT that a run does not make. Use lora, pissa or olora, or make the adapter "
        "with PEFT itself.",
    ),
    "monteclora": "it adds to a loss that a run does not take. Use lora.",
}
"""Names that people know from PEFT, and why there is no such method."""


def method_of(name: str, *, where: str = "method") -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    if reason := REFUSED.get(name.lower().replace("-", "_")):
        raise ConfigError(f"{where}: got {name!r}, which PEFT has and a run does not: {reason}")
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), METHODS, n=1, cutoff=0.5)
    hint = f"Did you mean '{nearest[0]}'?" if nearest else "`metier methods` lists them all."
    raise ConfigError(f"{where}: got {name!r}, which is no method. {hint}")


def tree() -> dict[str, dict[str, list[Method]]]:
    """Methods by kind and by group within it."""
    found: dict[str, dict[str, list[Method]]] = {kind: {} for kind in KINDS}
    for method in METHODS.values():
        kind, group = method.branch
        found[kind].setdefault(group, []).append(method)
    return {kind: groups for kind, groups in found.items() if groups}
