"""A folder for files that go with the process, and of which nothing stays even if it was killed.

Who makes one first removes those whose process is gone: it holds a lock on a file in its folder, and the system gives
locks back however a process ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from metier.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: folders of killed processes stay
    fcntl = None  # type: ignore[assignment]

_PREFIX = "metier-weights-"
_LOCK = ".in-use"
_TRIES = 5
"""How often another process may come between; where a file system never says which file is whose, that has to do."""
_MOUNTS = Path("/proc/self/mountinfo")


@contextmanager
def scratch_folder(parent: str | Path | None, *, option: str) -> Iterator[Path]:
    """A new folder in `parent`, which is made if need be; None is the system's temporary folder.

    Args:
        option: what `parent` is called where it was given, for messages.

    Raises:
        ConfigError: `parent` cannot be made or written.
    """
    try:
        inside = Path(tempfile.gettempdir() if parent is None else parent).expanduser()
        inside.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(inside)
        folder, lock = _made(inside)
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user's home
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{option}: {parent} cannot be written ({reason}), expected a folder for files.\nName another one."
        ) from error
    try:
        with lock:
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def held(file: Path) -> Iterator[bool]:
    """Hold a lock on a file that goes after it; whether nobody else has it. A process that ends gives it back."""
    for left in reversed(range(_TRIES)):
        lock = file.open("a")
        is_free = _take(lock, if_unknown=True)
        # who had it may have removed the file since it was opened, and others would lock another one
        if not is_free or _is_named(lock, file) or not left:
            break
        lock.close()
    with lock:
        try:
            yield is_free
        finally:
            if is_free:
                file.unlink(missing_ok=True)


@contextmanager
def gone_after_error(folder: Path) -> Iterator[None]:
    """Remove a folder's files if what uses them ends with an error: they are of no use to whoever goes on later."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def is_in_memory(folder: Path) -> bool:
    """Whether files in a folder are kept in memory, as many systems do with /tmp; False where nobody can tell."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    place, kind = Path("/"), ""
    for line in lines:
        mount, _, rest = line.partition(" - ")
        point = Path(mount.split()[4].replace("\\040", " "))
        # a later line covers an earlier one
        if folder.resolve().is_relative_to(point) and len(point.parts) >= len(place.parts):
            place, kind = point, rest.split()[0]
    return kind in ("tmpfs", "ramfs")


def warn_if_in_memory(folder: Path, option: str) -> None:
    """Of a store on disk in such a folder; `option` is what names another one."""
    if is_in_memory(folder):
        warnings.warn(
            f"{folder.parent} is kept in memory, so what is in it takes as much of that as it would without a store on "
            f"disk. Name a folder on a disk: {option}.",
            stacklevel=3,
        )


def _made(inside: Path) -> tuple[Path, IO[str]]:
    """A folder and its lock, which is held."""
    for left in reversed(range(_TRIES)):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=inside))
        lock = (folder / _LOCK).open("w")
        # another process may have come between, and taken it for an abandoned one
        if (_take(lock, if_unknown=True) and _is_named(lock, folder / _LOCK)) or not left:
            break
        lock.close()
    return folder, lock


def _remove_abandoned(parent: Path) -> None:
    if fcntl is None:
        return
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            with (folder / _LOCK).open("r+") as lock:
                if _take(lock):
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # somebody else's, or gone already
            continue


def _is_named(lock: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _take(lock: IO[str], *, if_unknown: bool = False) -> bool:
    """Whether nobody else has it; `if_unknown` where the file system has no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return if_unknown
    return True
