"""metier: specialise a Mixture-of-Experts language model for a task by training only the experts it uses.

This file is the public API, re-exported; nothing else. Names resolve on first use, so that `import metier`
and `metier --help` load neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metier._registration import register_with_peft
from metier.errors import (
    BaseMismatchError,
    ConfigError,
    CorruptDeltaError,
    DataError,
    DeltaError,
    MetierError,
    ModelError,
    RunError,
    SelectionError,
    UnsupportedModelError,
    VerificationError,
)

if TYPE_CHECKING:
    from metier.deltas.merge import merge
    from metier.deltas.verify import verify
    from metier.evaluation.evaluate import evaluate
    from metier.memory.frozen_model import load_frozen
    from metier.methods.esft import EsftConfig
    from metier.methods.expert_lora import ExpertLoraConfig
    from metier.models.load import load
    from metier.models.moe import MoELayer, moe_layers
    from metier.routing.profile import RoutingProfile, profile
    from metier.routing.selection import ExpertSelection, SelectionConfig, select
    from metier.training.run import train

__version__ = "0.1.0"

__all__ = [
    "load",
    "load_frozen",
    "moe_layers",
    "MoELayer",
    "profile",
    "RoutingProfile",
    "SelectionConfig",
    "select",
    "ExpertSelection",
    "EsftConfig",
    "ExpertLoraConfig",
    "train",
    "evaluate",
    "verify",
    "merge",
    "MetierError",
    "ConfigError",
    "DataError",
    "ModelError",
    "UnsupportedModelError",
    "SelectionError",
    "DeltaError",
    "CorruptDeltaError",
    "BaseMismatchError",
    "VerificationError",
    "RunError",
]

_HOMES = {
    "load": "metier.models.load",
    "load_frozen": "metier.memory.frozen_model",
    "moe_layers": "metier.models.moe",
    "MoELayer": "metier.models.moe",
    "profile": "metier.routing.profile",
    "RoutingProfile": "metier.routing.profile",
    "SelectionConfig": "metier.routing.selection",
    "select": "metier.routing.selection",
    "ExpertSelection": "metier.routing.selection",
    "EsftConfig": "metier.methods.esft",
    "ExpertLoraConfig": "metier.methods.expert_lora",
    "train": "metier.training.run",
    "evaluate": "metier.evaluation.evaluate",
    "verify": "metier.deltas.verify",
    "merge": "metier.deltas.merge",
}

register_with_peft()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'metier' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
