"""What of the stores on disk is in memory: read ahead, written and given up on threads of its own.

Mapped files need none of this to be right: the system pages them in and out. But it reads when somebody waits, it
gives up by age, and under a limit on the process's memory it would rather kill the process than wait for changed pages
to be written. Here what comes is known (`disk_policy.py`), so memory is kept a little below the limit, and the system
never has to choose.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor

from metier.distributed.ranks import ranks_here
from metier.memory.disk_policy import Kind, Phase, next_use, place
from metier.memory.mapped_file import MappedFile
from metier.memory.memory_limit import held_bytes, memory_limit_bytes
from metier.memory.meter import Meter

SHARE = 0.85
"""Of the memory that the process may use: the rest is for what comes suddenly."""

BATCH_BYTES = 64 << 20
"""What is given up at once beyond what is needed."""

MOST_ON_ITS_WAY_BYTES = 128 << 20
"""How far the writing may be behind before somebody has to wait."""

NUM_PROTECTED = 2
"""What was asked for in so many calls is being used, or will be at once."""


class Layer(Protocol):
    """Whose pieces a file has."""

    @property
    def layer_place(self) -> tuple[int, int]:
        """Which of how many."""
        ...


@dataclass(eq=False, weakref_slot=True, slots=True)
class CachedFile:
    """A mapped file in pieces of one size, and which of them are in memory."""

    file: MappedFile
    kind: Kind
    layer: Layer
    meter: Meter
    rows_per_piece: int
    last_call: dict[int, int] = field(default_factory=dict)
    """Pieces in memory and the call that asked for each last, the oldest first."""
    changed: set[int] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)
    """Pieces that the disk has; the others have never left memory, or hold nothing."""
    read: set[int] = field(default_factory=set)
    """Pieces of rows that came from the disk; who counts them empties it."""
    reading: Future[Any] | None = None
    """The last that the reader was given for it, until that is done; it takes all in turn."""

    piece_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.piece_bytes = self.part(0).nbytes

    def part(self, piece: int) -> Tensor:
        return self.file.tensor[piece * self.rows_per_piece : (piece + 1) * self.rows_per_piece]


class DiskCache:
    """Keeps account of pieces in memory, and gives up those that are wanted last when they are too many.

    Any thread may ask it, and a process that was forked off has one of its own.

    Args:
        most_bytes: of pieces in memory; None leaves them what the process may use and has not taken otherwise.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self.most_bytes = most_bytes
        self.num_bytes = 0
        self._limit = memory_limit_bytes()
        self._files: WeakSet[CachedFile] = WeakSet()
        self._now = self._call = 0
        self._start()
        _caches.add(self)

    def _start(self) -> None:
        self.lock = threading.RLock()
        """Held while the account changes; whoever keeps one of his own beside it may hold it too."""
        self._reader = ThreadPoolExecutor(1, "metier-disk-read")
        self._writer = ThreadPoolExecutor(1, "metier-disk-write")
        self._on_their_way: deque[tuple[Future[None], int]] = deque()

    def start_in_child(self) -> None:
        """After a fork, which leaves the threads and what they were doing behind."""
        self._start()
        for file in self._files:
            file.reading = None

    def come_to(self, phase: Phase, layer: Layer) -> None:
        """The step begins another part of its work."""
        with self.lock:
            self._now = place(phase, *layer.layer_place)
            self._call += 1

    def wanted(self, file: CachedFile, pieces: Sequence[int], *, to_write: bool = False) -> None:
        """These will be used soon: have them read if they are not in memory."""
        with self.lock:
            missing = [piece for piece in pieces if piece not in file.last_call]
            self._mark(file, pieces, self._call)
            # room is made before anything is read into it
            self._make_room()
            if missing:
                read = file.stored.intersection(missing)
                file.meter.bytes_from_disk += len(read) * file.piece_bytes
                if file.kind == "rows":
                    file.read |= read
                file.reading = self._reader.submit(_read, file, missing, to_write)

    def wait_for(self, file: CachedFile) -> None:
        """All that is wanted of a file is in memory; who touched it before would get it page by page."""
        reading = file.reading
        if reading is not None:
            reading.result()
            with self.lock:
                if file.reading is reading:  # nobody has asked for more meanwhile
                    file.reading = None

    def written(self, file: CachedFile, pieces: Sequence[int]) -> None:
        """These have changed. Those that were not announced, as when rows are made or loaded, nobody is waiting for."""
        with self.lock:
            unannounced = [piece for piece in pieces if piece not in file.last_call]
            self._mark(file, unannounced, self._call - NUM_PROTECTED)
            file.changed.update(pieces)
            self._make_room()

    def wait_until_written(self) -> None:
        """Until the disk has taken what it was given.

        Raises:
            RowStoreError: it could not, and something is lost.
        """
        with self.lock:
            while self._on_their_way:
                self._on_their_way.popleft()[0].result()

    def done_with(self, file: CachedFile) -> None:
        """Nobody is using what is in memory of a file any more: it need not stay until others have been asked for."""
        with self.lock:
            for piece in file.last_call:
                file.last_call[piece] = self._call - NUM_PROTECTED

    def forget(self, file: CachedFile, num_pieces: int) -> None:
        """The numbers of the first pieces are not wanted any more; who writes there next waits for this first."""
        with self.lock:
            for piece in range(num_pieces):
                if file.last_call.pop(piece, None) is not None:
                    self.num_bytes -= file.piece_bytes
                file.changed.discard(piece)
                file.stored.discard(piece)
            file.reading = self._reader.submit(file.file.give_up, file.file.tensor[: num_pieces * file.rows_per_piece])

    def room_bytes(self) -> int:
        """What pieces in memory may take."""
        if self.most_bytes is not None:
            return self.most_bytes
        return max(BATCH_BYTES, int(SHARE * self._limit / ranks_here().local_size) - held_bytes())

    def _mark(self, file: CachedFile, pieces: Sequence[int], call: int) -> None:
        self._files.add(file)
        for piece in pieces:
            if file.last_call.pop(piece, None) is None:
                self.num_bytes += file.piece_bytes
            file.last_call[piece] = call

    def _make_room(self) -> None:
        room = self.room_bytes()
        if self.num_bytes <= room:
            return
        self._count()
        clean: list[tuple[CachedFile, int]] = []
        dirty: list[tuple[CachedFile, int]] = []
        for file in sorted(self._files, key=self._next_use, reverse=True):
            for piece, call in list(file.last_call.items()):
                if self.num_bytes <= room - BATCH_BYTES or call > self._call - NUM_PROTECTED:
                    break
                del file.last_call[piece]
                self.num_bytes -= file.piece_bytes
                if piece in file.changed:
                    file.changed.remove(piece)
                    file.stored.add(piece)
                    file.meter.bytes_to_disk += file.piece_bytes
                    dirty.append((file, piece))
                else:
                    clean.append((file, piece))
        if clean:
            self._reader.submit(_drop, clean)
        if dirty:
            num_bytes = sum(file.piece_bytes for file, _ in dirty)
            self._on_their_way.append((self._writer.submit(_write_and_drop, dirty), num_bytes))
        # of what is done it is asked too: whether the disk took it
        while self._on_their_way and (
            self._on_their_way[0][0].done() or sum(size for _, size in self._on_their_way) > MOST_ON_ITS_WAY_BYTES
        ):
            self._on_their_way.popleft()[0].result()

    def _count(self) -> None:
        """Files that are gone have no pieces any more."""
        self.num_bytes = sum(len(file.last_call) * file.piece_bytes for file in self._files)

    def _next_use(self, file: CachedFile) -> int:
        return next_use(file.kind, *file.layer.layer_place, self._now)


def _read(file: CachedFile, pieces: Sequence[int], to_write: bool) -> None:
    # all are on their way before the first is waited for
    for piece in pieces:
        file.file.read_ahead(file.part(piece))
    for piece in pieces:
        file.file.make_present(file.part(piece), to_write=to_write)


def _drop(pieces: Sequence[tuple[CachedFile, int]]) -> None:
    for file, piece in pieces:
        file.file.unmap(file.part(piece))
        file.file.drop(file.part(piece))


def _write_and_drop(pieces: Sequence[tuple[CachedFile, int]]) -> None:
    for file, piece in pieces:
        # the system would take the right to write away page by page, and tell every core of each
        file.file.unmap(file.part(piece))
    # all are under way before the first is waited for
    for wait in (False, True):
        for file, piece in pieces:
            file.file.write_behind(file.part(piece), wait=wait)
    # whoever touched a neighbour meanwhile may have mapped some of their pages again
    _drop(pieces)


def _start_in_child() -> None:
    for made in _caches:
        made.start_in_child()


_caches: WeakSet[DiskCache] = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_in_child)


@cache
def disk_cache() -> DiskCache:
    """The process's own."""
    return DiskCache()
