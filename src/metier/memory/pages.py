"""What the system is told of a tensor's pages of memory."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

_PAGE = mmap.PAGESIZE
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # Linux; Python has no names for them


def _load_libc() -> ctypes.CDLL | None:
    """The C library, where it can be told."""
    try:
        found = ctypes.CDLL(None, use_errno=True)
        return found if hasattr(found, "madvise") else None
    except OSError:
        return None


libc = _load_libc()


def advise(part: Tensor, advice: int) -> None:
    """Of all pages that a contiguous part lies in. A refusal is no error: it is advice."""
    # Python's own madvise is a method of its mmap objects, and torch makes the mapping here
    start = part.data_ptr()
    first = start - start % _PAGE
    if libc is not None and part.nbytes:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + part.nbytes - first), ctypes.c_int(advice))


def populate(part: Tensor, *, to_write: bool) -> None:
    """Wait until a contiguous part is in memory, so that whoever uses it next finds it there without a fault.

    Its values stay as they are, whoever writes them meanwhile.
    """
    advise(part, _POPULATE_WRITE if to_write else _POPULATE_READ)
