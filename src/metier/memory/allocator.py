"""Have the C library give freed memory back to the system, for a process that has to stay within a limit."""

from __future__ import annotations

import ctypes
import os

_THRESHOLD_BYTES = 1 << 17
"""glibc's own first value, which it raises up to 32 MB when larger blocks are freed."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_ENVIRONMENT = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def give_memory_back() -> bool:
    """From now on every freed block of 128 kB goes back at once; what glibc keeps else does not always fit again.

    New blocks have to be made of fresh pages, which costs a step a third of its time or so. Whoever has set glibc's own
    environment variables is left alone.

    Returns whether anything was changed: the C library may be another one.
    """
    if is_left_alone():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, _THRESHOLD_BYTES) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def is_left_alone() -> bool:
    """Whether somebody has set glibc's own environment variables, and so knows better."""
    return any(name in os.environ for name in _ENVIRONMENT)


def give_back_what_is_free() -> bool:
    """Once: blocks that are free now go back to the system, so that what the process holds is what it uses.

    Returns whether anything was given back.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False
