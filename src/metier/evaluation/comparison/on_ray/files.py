"""Files of a folder as bytes, and back: how they come from a node that shares no disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from metier.evaluation.comparison.cells import RESULT


def read_files(root: Path, *, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder by its path in it; none where the folder is not there.

    Args:
        root: the folder.
        without: patterns of names; a file or a folder with such a name is left out.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(fnmatch(part, pattern) for part in parts for pattern in without):
            found["/".join(parts)] = path.read_bytes()
    return found


def write_files(root: Path, files: Mapping[str, bytes]) -> None:
    """Write them below a folder, a result last and at once: where it is there, all else is."""
    for name in sorted(files, key=lambda name: name == RESULT):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{path.name}.part")
        half.write_bytes(files[name])
        half.replace(path)


def add_folders(root: Path, files: Mapping[str, bytes]) -> None:
    """Write the folders of `files` that `root` has not, each at once."""
    for folder in sorted({name.split("/")[0] for name in files}):
        if not (root / folder).exists():
            half = root / f"{folder}.{os.getpid()}"
            write_files(half, {name.partition("/")[2]: files[name] for name in files if name.split("/")[0] == folder})
            half.rename(root / folder)
