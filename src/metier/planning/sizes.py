"""Sizes as people write them: `24GiB`. Torch-free, since a command line reads them before it does anything."""

from __future__ import annotations

import re

from metier.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    unit: 1 << shift for unit, shift in (("kib", 10), ("mib", 20), ("gib", 30), ("tib", 40))
}


def read_bytes(text: str, option: str) -> int:
    """A size such as `24GiB`, `8 GB` or `1000000`.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found.group(2).lower() not in _UNITS:
        raise ConfigError(f"{option}: got {text!r}, expected a size such as 24GiB, 8GB or 500MiB.")
    num_bytes = int(float(found.group(1)) * _UNITS[found.group(2).lower()])
    if num_bytes <= 0:
        raise ConfigError(f"{option}: got {text!r}, expected more than nothing.")
    return num_bytes
