"""An adapter belongs to the base that it was trained on: its configuration says which, and every tuner asks first."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn

from metier.errors import BaseMismatchError


def set_base_fingerprint(config: PeftConfig, model: nn.Module, found: str) -> None:
    """Write into `config` which base the adapter is put on; the first time says it, all others must agree.

    Args:
        config: of the adapter, with a field `base_fingerprint`.
        model: the base, for its name.
        found: its fingerprint.

    Raises:
        BaseMismatchError: the adapter was trained on another base.
    """
    if config.base_fingerprint not in (None, found):
        base = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        raise BaseMismatchError(
            f"The adapter was trained on '{config.base_model_name_or_path}' with fingerprint "
            f"{config.base_fingerprint[:12]}, but is put on '{base}' with fingerprint {found[:12]}.\n"
            "Load the base that it was trained on, or train it again on this one."
        )
    config.base_fingerprint = found
