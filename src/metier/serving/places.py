"""Which names deltas may be served under, and which folders they may be read from.

A folder that a request names must lie inside one that was allowed at the start, after every link is followed, and so
must its files. Files that run code when they are read are refused even where nothing would read them. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from metier.errors import RequestError

CONFIG_FILE = "adapter_config.json"
RUN_FOLDER = "adapter"
"""Where a run's folder has its delta."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".pickle", ".pkl", ".ckpt", ".joblib", ".dill", ".npy", ".npz"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, base_name: str) -> None:
    """Raise a RequestError if a delta cannot be served as `name`."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"got {name[:100]!r} as a delta's name, expected at most 100 letters, digits, dots, dashes and "
            "underscores, the first a letter or a digit."
        )
    if name == base_name:
        raise RequestError(f"got {name!r} as a delta's name, which is the base's. Give the delta another.")


def check_files(folder: Path) -> None:
    """Raise a RequestError if `folder` is none, or has files that may run code when they are read."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: got {'a file' if folder.exists() else 'no such folder'}, expected a delta's.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        raise RequestError(
            f"{folder}: got {pickles[0]}, which may run code when it is read; expected safetensors only.\n"
            "Save the delta as safetensors, and take that file out of the folder."
        )


def allowed_folder(path: str, allowed: Sequence[Path]) -> Path:
    """The folder that a request names, with all links followed.

    Args:
        path: absolute, or relative to one of the allowed folders.
        allowed: folders that deltas may be read from.

    Raises:
        RequestError: it is outside of them, or a file in it is; it is no folder; or it has other files than may be.
    """
    refusal = RequestError(
        f"got {path[:200]!r}, expected a folder inside one that deltas may be read from, without '..'.\n"
        "Start the server with --delta-dir DIR to allow one."
    )
    if ".." in Path(path).parts:
        raise refusal
    try:
        roots = [root.resolve() for root in allowed]
        inside = [found for root in roots if (found := _inside(root / path, root)) is not None]
        inside.sort(key=lambda found: not found.is_dir())
    except (OSError, ValueError, RuntimeError):
        # a name that no file can have, or links in a circle
        raise refusal from None
    if not inside:
        raise refusal
    check_files(inside[0])
    _check_links(inside[0], roots)
    return inside[0]


def deltas_in(folder: Path) -> dict[str, Path]:
    """The deltas in a folder's sub-folders, by the sub-folders' names: deltas themselves, or runs that left one.

    Raises:
        RequestError: it is no folder; or a delta's place or files are not as they may be.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: got {'a file' if folder.exists() else 'no such folder'}, expected a folder.")
    found = {}
    for child in sorted(folder.iterdir()):
        for place in (Path(child.name), Path(child.name, RUN_FOLDER)):
            if (folder / place / CONFIG_FILE).is_file():
                found[child.name] = allowed_folder(str(place), [folder])
                break
    return found


def _inside(path: Path, root: Path) -> Path | None:
    resolved = path.resolve()
    return resolved if resolved.is_relative_to(root) and resolved != root else None


def _check_links(folder: Path, roots: Sequence[Path]) -> None:
    for path in folder.iterdir():
        resolved = path.resolve()
        if not any(resolved.is_relative_to(root) for root in roots):
            raise RequestError(f"{folder}: {path.name} is a link that leads out of the folders that may be read from.")
        if not (resolved.is_file() or resolved.is_dir()):
            raise RequestError(f"{folder}: {path.name} is no ordinary file.")
