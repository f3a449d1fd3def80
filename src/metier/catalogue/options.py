"""A method's own options: the fields of its configuration class, read from a text or YAML and checked by their types.

The class is imported when a run first asks, for PEFT brings torch along.
"""

from __future__ import annotations

import importlib
import typing
from functools import cache
from typing import Any

import yaml

from metier.catalogue.method import Method
from metier.catalogue.tree import method_of
from metier.errors import ConfigError

_NOT_OF_A_RUN = frozenset(
    {
        "auto_mapping", "base_fingerprint", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
        "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
"""Fields that PEFT or metier sets."""


def config_class(method: Method) -> type:
    """The method's configuration class, a dataclass."""
    assert method.config is not None, f"{method.name} has no configuration class"
    module, _, name = method.config.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


@cache
def option_types(name: str) -> dict[str, Any]:
    """Options of a method by name, each with its type; empty where it has none."""
    method = method_of(name)
    own = {option: type(value) for option, value in method.procedure_options.items()}
    if method.config is None:
        return own
    hints = typing.get_type_hints(config_class(method))
    return own | {
        field: hint
        for field, hint in hints.items()
        if field not in _NOT_OF_A_RUN and field not in method.fixed and not field.startswith("_")
    }


def read_option(method: str, option: str, value: object, where: str) -> Any:
    """The value in its option's type. Texts are parsed as YAML, and as a list where they have commas and it may be one.

    Raises:
        ConfigError: it is of another type.
    """
    from pydantic import TypeAdapter, ValidationError  # as heavy as the rest of a command line

    hint = option_types(method)[option]
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    reasons = []
    for candidate in _readings(value):
        try:
            return adapter.validate_python(candidate)
        except ValidationError as error:
            reasons.append(error.errors()[0]["msg"])
    raise ConfigError(f"{where}: {option} of method {method} must be {_spelled(hint)}, got {value!r} ({reasons[0]}).")


def _readings(value: object) -> list[object]:
    """What a value may mean, the likeliest first."""
    if not isinstance(value, str):
        return [value]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    several = [part.strip() for part in value.split(",") if part.strip()]
    listed = several if "," in value and not value.lstrip().startswith(("[", "{")) else [value]
    return [parsed, listed, value] if "," not in value else [listed, parsed, value]


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
