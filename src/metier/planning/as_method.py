"""A run with another method: what only one of them has goes back to its default."""

from __future__ import annotations

import dataclasses
from typing import Any

from metier.catalogue.tree import method_of
from metier.config import LORA_KEYS, RunConfig, passed_over
from metier.methods.from_catalogue import lora_keys_of


def as_method(config: RunConfig, method: str) -> RunConfig:
    """The run with a method of that name; everything that both may have stays as it is.

    Raises:
        ConfigError: there is no such method, or the run cannot have it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    reset: dict[str, Any] = {name: defaults[name] for name in foreign_keys(method)}
    if config.base_format == method_of(config.method).base_format:
        reset["base_format"] = None
    if method != config.method:
        reset |= {"method_options": {}, "targets": None}
    return dataclasses.replace(config, method=method, **reset)


def foreign_keys(method: str) -> set[str]:
    """Keys of a run that a method would pass over, or that it refuses."""
    wanted = method_of(method)
    found = {name for name in LORA_KEYS if name not in lora_keys_of(wanted)} | passed_over(method)
    if not wanted.selects_experts:
        found |= {name for name in _NAMES if name.startswith("train_") or name.endswith("_learning_rate")}
    if wanted.changes_base:
        found |= {"base_store", "base_format", "base_folder"}
    if wanted.not_resumable:
        found |= {"save_steps", "resume_from_checkpoint"}
    return found


_NAMES = tuple(field.name for field in dataclasses.fields(RunConfig))
