"""Keep Python's garbage collector from looking at objects that stay until the process ends.

torch and transformers leave half a million of them behind. A full collection visits each, a quarter of a second in
which no other thread runs: whatever a server computes meanwhile is late by that much. Python collects so by itself now
and then and as a process ends, and transformers twice as a batch of its continuous batching ends.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_is_done = False


def keep_objects() -> bool:
    """Leave out of all collections to come what is there now, garbage aside; only the first call of a process does it.

    What becomes garbage later of what is there now and refers to itself is never freed: so call it once all modules
    are imported and what a process is for is loaded.

    Returns whether it was done.
    """
    global _is_done
    if _is_done:
        return False
    gc.collect()
    gc.freeze()
    _is_done = True
    return True


@contextmanager
def at_rest() -> Iterator[None]:
    """For work that makes many objects and few rings: no collection until it is done."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
