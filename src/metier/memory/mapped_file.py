"""Tensors that live in a file: mapped into memory, paged in and out by the system, never all held by the process."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from metier.errors import RowStoreError

_PAGE = mmap.PAGESIZE


def create_mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in a new file, whose room on the disk is reserved at once.

    Raises:
        RowStoreError: the disk has no room for it, or the folder cannot be written.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            # a hole would fail later, as a signal in the middle of a step
            os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise RowStoreError(
            f"{path}: cannot reserve {num_bytes:,} bytes ({error.strerror}); nothing was written.\n"
            "Make room on the disk, name a folder on another one, or use fewer rows."
        ) from error
    return open_mapped(path, shape, dtype)


def open_mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor in a file that `create_mapped` made; what is written into it goes to the file.

    Raises:
        RowStoreError: there is no such file, or it is of another size.
    """
    expected = max(1, math.prod(shape) * dtype.itemsize)
    if not path.is_file():
        raise RowStoreError(f"{path}: there is no such file; it held rows of an adapter. Begin the run again.")
    got = path.stat().st_size
    if got != expected:
        raise RowStoreError(
            f"{path}: holds {got:,} bytes, expected {expected:,} for {str(dtype).removeprefix('torch.')} "
            f"{list(shape)}.\nIt is another store's or was cut off; remove its folder and begin again."
        )
    flat = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
    return flat.view(shape)


def read_ahead(part: Tensor) -> None:
    """Ask the system to read a contiguous part of a mapped tensor from the disk, without waiting for it."""
    start = part.data_ptr()
    first = start - start % _PAGE
    _madvise(first, start + part.nbytes - first, mmap.MADV_WILLNEED)


def _madvise(address: int, length: int, advice: int) -> None:
    # Python's own madvise is a method of its mmap objects, and torch makes the mapping here. A refusal is not an
    # error: it is advice
    if _libc is not None:
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice))


def _load_libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc if hasattr(libc, "madvise") else None
    except OSError:
        return None


_libc = _load_libc()
