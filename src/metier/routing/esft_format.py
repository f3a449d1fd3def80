"""ESFT's own file format for a selection, read and written to the letter, so that files travel both ways.

```
{"experts": {"1": [8, 26, 55, 6, 20], …}, "shared_experts": false, "non_expert_modules": false}
```

The keys of `experts` are decoder layers counted from 0, dense ones included, as strings. The published files
list a layer's experts by falling score; that order, and the order of the layers, survives reading and
writing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.errors import SelectionError

_EXAMPLE = '{"experts": {"1": [8, 26]}, "shared_experts": false, "non_expert_modules": false}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """The content of one such file."""

    experts: dict[int, tuple[int, ...]]
    shared_experts: bool
    non_expert_modules: bool


def write_expert_config(path: Path, config: ExpertConfig) -> None:
    """Write `config` as the published files are written: one line, without a newline at its end."""
    content = {
        "experts": {str(layer): list(experts) for layer, experts in config.experts.items()},
        "shared_experts": config.shared_experts,
        "non_expert_modules": config.non_expert_modules,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def read_expert_config(path: Path) -> ExpertConfig:
    """Read `path`; whether the experts exist in a model is not known here.

    Raises:
        SelectionError: no such file, or content that is not of this format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise SelectionError(f"{path}: {error.strerror}; expected a selection file.") from error
    except ValueError as error:  # broken JSON, broken UTF-8, or a key twice
        raise SelectionError(f"{path}: not valid JSON: {error}\nExpected {_EXAMPLE}") from error
    keys = {"experts", "shared_experts", "non_expert_modules"}
    if not isinstance(content, dict) or content.keys() != keys:
        got = f"the keys {sorted(content)}" if isinstance(content, dict) else type(content).__name__
        raise SelectionError(f"{path}: got {got}, expected the keys {sorted(keys)}, as in {_EXAMPLE}")
    for flag in ("shared_experts", "non_expert_modules"):
        if not isinstance(content[flag], bool):
            raise SelectionError(f"{path}: {flag}: got {content[flag]!r}, expected true or false.")
    if not isinstance(content["experts"], Mapping):
        raise SelectionError(f"{path}: experts: got {content['experts']!r}, expected layers, as in {_EXAMPLE}")
    return ExpertConfig(
        experts={_layer(path, key): _expert_ids(path, key, ids) for key, ids in content["experts"].items()},
        shared_experts=content["shared_experts"],
        non_expert_modules=content["non_expert_modules"],
    )


def _layer(path: Path, key: str) -> int:
    if not key.isdecimal() or str(int(key)) != key:
        raise SelectionError(
            f'{path}: experts: got layer {key!r}, expected the number of a decoder layer, such as "7".'
        )
    return int(key)


def _expert_ids(path: Path, layer: str, ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(isinstance(expert, int) and not isinstance(expert, bool) for expert in ids):
        raise SelectionError(f"{path}: layers.{layer}: got {ids!r}, expected a list of expert ids, such as [8, 26].")
    return tuple(ids)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return content
