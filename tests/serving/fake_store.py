"""A place for deltas that is only a dictionary; it can be told to fail or to take its time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metier.serving.served_delta import ServedDelta


@dataclass
class FakeStore:
    placed: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """By handle: values by the tensor's name."""
    log: list[str] = field(default_factory=list)
    """`place NAME` and `remove NAME`, by the folder's name."""
    fails: Exception | None = None
    """What `place` raises once it has copied."""
    fails_to_remove: Exception | None = None
    may_place: threading.Event = field(default_factory=threading.Event)
    is_placing: threading.Event = field(default_factory=threading.Event)
    names: dict[int, str] = field(default_factory=dict)
    to_ready: int = 0
    """Pieces of work to be done where nothing else is to do."""

    def __post_init__(self) -> None:
        self.may_place.set()

    def place(self, delta: ServedDelta) -> int:
        self.is_placing.set()
        assert self.may_place.wait(10)
        values = {x.name: torch.zeros(x.shape, dtype=x.dtype) for x in delta.tensors}
        delta.copy_into(lambda tensor: values[tensor.name])
        if self.fails is not None:
            raise self.fails
        handle = len(self.log)
        self.placed[handle], self.names[handle] = values, delta.folder.name
        self.log.append(f"place {delta.folder.name}")
        return handle

    def remove(self, handle: int) -> None:
        if self.fails_to_remove is not None:
            raise self.fails_to_remove
        del self.placed[handle]
        self.log.append(f"remove {self.names[handle]}")

    def readying(self) -> Callable[[], None] | None:
        return self._make_ready if self.to_ready else None

    def _make_ready(self) -> None:
        self.to_ready -= 1
        self.log.append("ready")
