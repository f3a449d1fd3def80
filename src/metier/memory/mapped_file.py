"""Tensors that live in a file: mapped into memory, paged in and out by the system, never all held by the process.

The system reads what is touched and writes what was changed, but late: it reads a page when somebody waits for it, and
keeps changed pages until memory is short, which under a limit on the process can be too late. So parts can be read
ahead, written behind, and taken out of memory (`disk_cache.py` decides when, and does it on threads of its own).
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metier.errors import RowStoreError
from metier.memory.pages import advise, libc, populate

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_PAGE = mmap.PAGESIZE
# Linux; elsewhere parts are neither written behind nor given up, and the system does as it likes
_WRITE, _WAIT = 2, 1 | 2 | 4
_ZERO_RANGE = 0x10
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_ZEROS = bytes(1 << 20)


@dataclass(slots=True, weakref_slot=True)
class MappedFile:
    """A tensor in a file; what is written into the one is in the other."""

    path: Path
    tensor: Tensor
    fd: int

    def read_ahead(self, part: Tensor) -> None:
        """Ask the system to read a contiguous part of the tensor from the disk, without waiting for it."""
        advise(part, mmap.MADV_WILLNEED)

    def make_present(self, part: Tensor, *, to_write: bool) -> None:
        """As `populate`."""
        populate(part, to_write=to_write)

    def write_behind(self, part: Tensor, *, wait: bool = False) -> None:
        """Have the system write a contiguous part to the disk now; `wait` until it has, and its pages can be reused.

        Raises:
            RowStoreError: the disk could not take it, and who waited was told.
        """
        if libc is not None and hasattr(libc, "sync_file_range"):
            first, length = self._range(part)
            what = ctypes.c_int64(first), ctypes.c_int64(length), _WAIT if wait else _WRITE
            if libc.sync_file_range(self.fd, *what) and ctypes.get_errno() in _LOST:
                raise RowStoreError(
                    f"{self.path}: the disk could not take {length:,} bytes of a store "
                    f"({os.strerror(ctypes.get_errno())}), which are lost.\n"
                    "Look after the disk, and resume from the last checkpoint."
                )

    def unmap(self, part: Tensor) -> None:
        """Take a contiguous part out of the process, though not yet out of memory; who touches it maps it again."""
        advise(part, mmap.MADV_DONTNEED)

    def drop(self, part: Tensor) -> None:
        """Take an unmapped part out of memory; what of it was changed and not yet written stays."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, *self._range(part), os.POSIX_FADV_DONTNEED)

    def give_up(self, part: Tensor) -> bool:
        """The numbers of a contiguous part are not wanted any more: its whole pages become zeros, and none is written.

        Returns whether the file system could do so; else they stay as they are.
        """
        first, length = self._range(part)
        inner = -(-first // _PAGE) * _PAGE
        whole = (first + length) // _PAGE * _PAGE - inner
        if libc is None or not hasattr(libc, "fallocate") or whole <= 0:
            return False
        return int(libc.fallocate(self.fd, _ZERO_RANGE, ctypes.c_int64(inner), ctypes.c_int64(whole))) == 0

    def expect(self, *, in_order: bool) -> None:
        """Whether all of it will be read from end to end, or parts of it, of which the system is told."""
        advise(self.tensor, mmap.MADV_SEQUENTIAL if in_order else mmap.MADV_RANDOM)

    def _range(self, part: Tensor) -> tuple[int, int]:
        """Where a part is in the file: its first byte, and how many there are."""
        return part.data_ptr() - self.tensor.data_ptr(), part.nbytes


def create_mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> MappedFile:
    """A tensor of zeros in a new file, whose room on the disk is reserved at once.

    Raises:
        RowStoreError: the disk has no room for it, or the folder cannot be written.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # who maps a former file of that name keeps it
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            # a hole would fail later, as a signal in the middle of a step
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
            else:
                for first in range(0, max(1, num_bytes), len(_ZEROS)):
                    file.write(_ZEROS[: max(1, num_bytes) - first])
    except OSError as error:
        path.unlink(missing_ok=True)
        raise RowStoreError(
            f"{path}: cannot reserve {num_bytes:,} bytes ({error.strerror}); nothing was written.\n"
            "Make room on the disk, name a folder on another one, or keep less there."
        ) from error
    return open_mapped(path, shape, dtype)


def open_mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> MappedFile:
    """The tensor in a file that `create_mapped` made.

    Raises:
        RowStoreError: there is no such file, or it is of another size.
    """
    expected = max(1, math.prod(shape) * dtype.itemsize)
    if not path.is_file():
        raise RowStoreError(
            f"{path}: there is no such file; it held numbers of a store. Resume from the last checkpoint."
        )
    got = path.stat().st_size
    if got != expected:
        raise RowStoreError(
            f"{path}: holds {got:,} bytes, expected {expected:,} for {str(dtype).removeprefix('torch.')} "
            f"{list(shape)}.\nIt is another store's or was cut off; remove it and resume from the last checkpoint."
        )
    flat = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
    mapped = MappedFile(path, flat.view(shape), os.open(path, os.O_RDWR))
    weakref.finalize(mapped, os.close, mapped.fd)
    _allow_more_files(mapped.fd)
    # else whoever touches a page gets megabytes around it, which nobody counts
    mapped.expect(in_order=False)
    return mapped


def _allow_more_files(newest: int) -> None:
    """A large model has more weights than a process may have files open, as the limit usually is set."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and newest > soft // 2:
        more = 2 * soft if hard == resource.RLIM_INFINITY else min(2 * soft, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
