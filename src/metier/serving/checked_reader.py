"""Read stored tensors once, in two threads: the very bytes that are hashed are those where they are wanted.

A delta may be gigabytes, and requests are running meanwhile. So it is read a piece at a time for each thread, small
enough for a processor's cache: straight to where it is wanted, or copied there, and hashed while it is in the cache.
The threads take what the requests' steps leave of the processors.
The file is not mapped into memory: one that is cut off under a mapping kills the process, and one that is altered
meanwhile could be another when it is copied than it was when it was hashed.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from metier.deltas.format import DAMAGED, tensor_sum
from metier.deltas.read import wrong_sum
from metier.deltas.tensors_file import DTYPES, StoredTensor
from metier.errors import CorruptDeltaError, DeltaError
from metier.memory.openmp import OneThreadEach
from metier.serving.side_work import SIDE_WORK, stand_back

_PIECE_BYTES = 1 << 20
_NUM_THREADS = 2
_NICENESS = 4
"""Where they want the same processor as a step, which leaves them others if there are any: four tenths of its share."""
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Rows = Tensor | Sequence[Tensor]
"""Where a stored tensor goes: to one of its shape, or to one for each index of its first axis, in any float dtype."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """By which a file is known not to have been altered or replaced."""

    inode: int
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, file: Path | int) -> FileStamp:
        """Of a file by its path or its descriptor."""
        status = os.stat(file)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """A safetensors file whose header has been read."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    """Those to read, by name."""
    sums: Mapping[str, str]
    """`tensor_sum` of each; empty where the file carries none, and has to be the same file still instead."""
    stamp: FileStamp
    """From before its header was read."""


class CheckedReader:
    """Two threads, which wait for files to read. `close` ends them."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "delta-reader")
        # one processor each: torch's own threads would take those of the running requests
        one_each = OneThreadEach(_NUM_THREADS)
        begun = [self._threads.submit(_stand_back, one_each) for _ in range(_NUM_THREADS)]
        one_each.wait()
        wait(begun)

    def read(self, file: TensorFile, destinations: Mapping[str, Rows] | None = None) -> None:
        """Read all tensors of a file, check their sums, and copy them on.

        Nothing is in use yet, where an error is raised: what has been copied by then is to be thrown away.

        Args:
            file: what to read.
            destinations: where to, by tensor; None only checks the sums.

        Raises:
            CorruptDeltaError: a tensor is not the one whose sum the file has, or is cut off.
            DeltaError: the file was altered since its header was read, or cannot be read; or values are not finite,
                or not in the dtype that they are copied to.
        """
        job = _Job(file, destinations, deque(sorted(file.tensors, key=lambda name: -_num_bytes(file.tensors[name]))))
        with SIDE_WORK.beside(_NUM_THREADS):
            futures = [self._threads.submit(self._work, job) for _ in range(_NUM_THREADS)]
            wait(futures)  # both: none may write on after the other has failed
        for future in futures:
            future.result()

    def close(self) -> None:
        self._threads.shutdown()

    def _work(self, job: _Job) -> None:
        path = job.file.path
        try:
            with path.open("rb", buffering=0) as file:
                _check_unaltered(job.file, file)
                while job.left:
                    try:
                        name = job.left.popleft()
                    except IndexError:  # the other thread took the last one
                        break
                    self._read_tensor(job, file, name)
                _check_unaltered(job.file, file)
        except OSError as error:
            job.left.clear()
            raise DeltaError(
                f"{path}: cannot be read ({error.strerror or error}).\nSee to it that it is there and can be read, "
                "then ask again."
            ) from error
        except BaseException:
            job.left.clear()
            raise

    def _read_tensor(self, job: _Job, file: FileIO, name: str) -> None:
        stored, expected = job.file.tensors[name], job.file.sums.get(name)
        rows = None if job.destinations is None else job.destinations[name]
        pieces = self._pieces(job.file.path, file, name, stored, rows, is_checked=expected is not None)
        try:
            got = None if expected is None else tensor_sum(stored.dtype, stored.shape, pieces)
            for _ in pieces:
                pass  # what is not hashed has to be copied all the same
        except CorruptDeltaError as error:
            raise _altered(job.file, file) or error from error
        if got != expected:
            raise _altered(job.file, file) or wrong_sum(job.file.path, name, got, expected)

    def _pieces(
        self, path: Path, file: FileIO, name: str, stored: StoredTensor, rows: Rows | None, *, is_checked: bool
    ) -> Iterator[memoryview]:
        """The bytes of a tensor, a piece at a time, each where it is wanted already."""
        buffer, dtype = self._buffer(), _TORCH_DTYPES[stored.dtype]
        file.seek(stored.first_byte)
        for length, part in _parts(stored, rows):
            place = None if part is None or part.dtype != dtype else _own_memory(part)
            view = buffer.numpy().data[:length] if place is None else place
            if _read_into(file, view) < length:
                raise CorruptDeltaError(f"{path}: {name}: got a file that is cut off.\n{DAMAGED}")
            if part is not None:
                values = part if place is not None else buffer[:length].view(dtype).view(part.shape)
                if not is_checked or part.dtype != dtype:
                    _check_finite(path, name, values, part.dtype)
                if place is None:
                    part.copy_(values)
            yield view

    def _buffer(self) -> Tensor:
        """The calling thread's own."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
        buffer: Tensor = self._local.buffer
        return buffer


@dataclass(frozen=True, slots=True)
class _Job:
    file: TensorFile
    destinations: Mapping[str, Rows] | None
    left: deque[str]
    """Tensors that no thread has begun; empty once one has failed."""


def _stand_back(one_each: OneThreadEach) -> None:
    """Take one processor for the calling thread, and that after those who compute answers."""
    stand_back(_NICENESS)
    one_each.enter()  # waits for the other: else one thread would take both calls


def _num_bytes(stored: StoredTensor) -> int:
    return stored.end_byte - stored.first_byte


def _parts(stored: StoredTensor, rows: Rows | None) -> Iterator[tuple[int, Tensor | None]]:
    """A tensor in the order of its bytes: how many of them, and where they go."""
    if rows is None:
        total = _num_bytes(stored)
        yield from ((min(_PIECE_BYTES, total - first), None) for first in range(0, total, _PIECE_BYTES))
        return
    item_bytes = DTYPES[stored.dtype]
    got = tuple(rows.shape) if isinstance(rows, Tensor) else (len(rows), *rows[0].shape)
    assert got == stored.shape, f"room for shape {got} where {stored.shape} is stored"
    for row in [rows] if isinstance(rows, Tensor) else rows:
        yield from ((part.numel() * item_bytes, part) for part in _split(row, _PIECE_BYTES // item_bytes))


def _split(rows: Tensor, max_numel: int) -> Iterator[Tensor]:
    if rows.numel() <= max_numel:
        yield rows
        return
    at_once = max_numel * len(rows) // rows.numel()
    if at_once:
        yield from rows.split(at_once)
    else:
        for row in rows:
            yield from _split(row, max_numel)


def _own_memory(part: Tensor) -> memoryview | None:
    """Of a tensor into which bytes can be read as they are; None where they have to be copied."""
    if part.device.type != "cpu" or not part.is_contiguous():
        return None
    return part.detach().view(-1).view(torch.uint8).numpy().data


def _read_into(file: FileIO, view: memoryview) -> int:
    """How many bytes were there."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            break
        done += got
    return done


def _check_finite(path: Path, name: str, values: Tensor, dtype: torch.dtype) -> None:
    # no value is larger than the norm, which is quick; only where that says nothing are the values looked at
    is_small = float(torch.linalg.vector_norm(values)) <= torch.finfo(dtype).max
    if not is_small and not torch.isfinite(values.to(dtype)).all():
        raise DeltaError(
            f"{path}: {name}: the delta holds values that are not finite in {dtype}, the base's dtype.\n"
            "If its run diverged, train it again; if the dtype is too narrow, serve the base in a wider one."
        )


def _altered(file: TensorFile, opened: FileIO) -> DeltaError | None:
    if FileStamp.of(opened.fileno()) == file.stamp:
        return None
    return DeltaError(
        f"{file.path}: the file was altered or replaced since the delta was put into service.\n"
        "Take the delta out of service and put it in again."
    )


def _check_unaltered(file: TensorFile, opened: FileIO) -> None:
    """Raise if a file without sums is not the same one any more."""
    error = None if file.sums else _altered(file, opened)
    if error is not None:
        raise error
