"""Put a checkpoint's tensors into files of at most a given size, one file's tensors in memory at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from metier.deltas.checkpoint_files import INDEX, ONE_FILE, CheckpointFiles, open_checkpoint
from metier.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", re.IGNORECASE)


def shard_bytes(size: str) -> int:
    """The number of bytes in a size such as `5GB`, `500MB` or `1000000`; units are powers of 1000, as transformers has
    them.

    Raises:
        ConfigError: it is no such size.
    """
    found = _SIZE.fullmatch(size.strip())
    unit = (found[2] or "").upper() if found else ""
    num_bytes = int(float(found[1]) * _UNITS.get(unit, 1)) if found else 0
    if num_bytes < 1:
        raise ConfigError(f"max_shard_size: got {size!r}, expected a size such as 5GB, 500MB or 1000000.")
    return num_bytes


def reshard(folder: Path, max_bytes: int) -> None:
    """Rewrite a folder's safetensors files so that none holds more than `max_bytes` of tensors.

    A tensor that is larger has a file of its own. Tensors keep their order, their names and their bits.
    """
    files = open_checkpoint(folder)
    assert files is not None, "a checkpoint that was just written has safetensors files"
    parts = _parts(files, max_bytes)
    names = _names(len(parts))
    new = folder / ".shards"
    new.mkdir()
    for name, tensors in zip(names, parts, strict=True):
        save_file({tensor: files.read(tensor) for tensor in tensors}, new / name, metadata={"format": "pt"})
    for old in (*files.file_names(), INDEX):
        (folder / old).unlink(missing_ok=True)
    for name in names:
        (new / name).rename(folder / name)
    new.rmdir()
    if len(parts) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, parts, strict=True) for tensor in tensors}
        total = sum(_num_bytes(files, tensor) for tensor in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _parts(files: CheckpointFiles, max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each new file."""
    parts: list[list[str]] = [[]]
    free = max_bytes
    for name in sorted(files.tensors, key=lambda n: (files.tensors[n][0], files.tensors[n][1].first_byte)):
        num_bytes = _num_bytes(files, name)
        if parts[-1] and num_bytes > free:
            parts.append([])
            free = max_bytes
        parts[-1].append(name)
        free -= num_bytes
    return parts


def _num_bytes(files: CheckpointFiles, name: str) -> int:
    stored = files.tensors[name][1]
    return stored.end_byte - stored.first_byte


def _names(num_files: int) -> list[str]:
    if num_files == 1:
        return [ONE_FILE]
    return [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]
