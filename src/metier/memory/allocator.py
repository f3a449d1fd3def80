"""Have the C library give freed memory back to the system, for a process that has to stay within a limit; or keep it,
for one that does the same over and over."""

from __future__ import annotations

import ctypes
import os

_THRESHOLD_BYTES = 1 << 17
"""glibc's own first value, which it raises up to 32 MB when larger blocks are freed."""
_MOST_BYTES = (1 << 31) - 1
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_ENVIRONMENT = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def give_memory_back() -> bool:
    """From now on every freed block of 128 kB goes back at once; what glibc keeps else does not always fit again.

    New blocks have to be made of fresh pages, which costs a step a third of its time or so. Whoever has set glibc's own
    environment variables is left alone.

    Returns whether anything was changed: the C library may be another one.
    """
    return not is_left_alone() and _set_thresholds(_THRESHOLD_BYTES)


def keep_memory() -> bool:
    """From now on freed blocks are kept for the next ones, instead of being made of fresh pages each time.

    Whoever has set glibc's own environment variables is left alone. Returns whether anything was changed.
    """
    return not is_left_alone() and _set_thresholds(_MOST_BYTES)


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


def _set_thresholds(num_bytes: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, num_bytes) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
