"""Write a folder whole or not at all: beside its place first, then moved there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metier.errors import ConfigError


def check_replaceable(folder: Path, *, known: frozenset[str] | None, marker: str, what: str) -> None:
    """Refuse to write where something lies that is not a former result of the same kind.

    Args:
        folder: where the result is to be.
        known: the only file names that a former result has; None where any may be in it.
        marker: the file by which a former result is known.
        what: the former result in words, for the message.

    Raises:
        ConfigError: `folder` is a file, or holds something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: got a file, expected a folder to write to, or none.\nChoose another place.")
    names = {path.name for path in folder.iterdir()}
    foreign = names - known if known is not None and marker in names else names
    if names and (marker not in names or (known is not None and foreign)):
        raise ConfigError(
            f"{folder}: got a folder with {', '.join(sorted(foreign)[:3])}{' …' if len(foreign) > 3 else ''}, expected "
            f"none, an empty one, or {what}.\nNothing was written. Choose another place, or move those files away."
        )


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends without an exception.

    What was there before is removed only once the new one has its name. Killed before that, `folder` is untouched;
    killed between the two renames, the old one lies beside as `.NAME.old-…` and the new one as `.NAME.new-…`, whole.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        yield new
        new.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        for path in [*new.rglob("*"), new]:
            _to_disk(path)
        old = _moved_aside(folder)
        try:
            os.rename(new, folder)
        except BaseException:
            if old is not None:
                os.replace(old, folder)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _to_disk(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _moved_aside(folder: Path) -> Path | None:
    if not folder.exists():
        return None
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    os.replace(folder, old)  # a folder may replace an empty one
    return old


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
