"""Reading tensors once: right bytes in the right places, or an error and no thread that still writes."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import metier.serving.checked_reader as checked_reader
from metier.deltas.format import tensor_sum
from metier.deltas.tensors_file import read_file_header, write_tensors
from metier.deltas.write import as_stored
from metier.errors import CorruptDeltaError, DeltaError
from metier.serving.checked_reader import CheckedReader, FileStamp, TensorFile


def written(path: Path, tensors: dict[str, Tensor], *, has_sums: bool = True) -> TensorFile:
    stored = {name: as_stored(tensor) for name, tensor in tensors.items()}
    write_tensors(path, stored, {})
    sums = {name: tensor_sum(x.dtype, x.shape, [data]) for name, (x, data) in stored.items()}
    header, _ = read_file_header(path)
    return TensorFile(path=path, tensors=header, sums=sums if has_sums else {}, stamp=FileStamp.of(path))


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def alter(path: Path, at: int) -> None:
    """One bit, leaving no trace but in the content."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that tensors, rows and lines are all cut."""
    monkeypatch.setattr(checked_reader, "_PIECE_BYTES", 64)


TENSORS = {"a": some(3, 5, 7), "b": some(1), "c": some(2, 40), "d": some(4, 3, dtype=torch.float64)}


@pytest.mark.parametrize("has_sums", [True, False])
@pytest.mark.parametrize("is_by_row", [True, False])
@pytest.mark.usefixtures("small_pieces")
def test_all_values_arrive(tmp_path: Path, is_by_row: bool, has_sums: bool) -> None:
    reader = CheckedReader()
    file = written(tmp_path / "x", TENSORS, has_sums=has_sums)
    got = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    reader.read(file, {name: list(tensor) if is_by_row else tensor for name, tensor in got.items()})
    assert all(torch.equal(got[name], tensor) for name, tensor in TENSORS.items())
    reader.close()


@pytest.mark.usefixtures("small_pieces")
def test_rows_go_to_places_that_are_not_contiguous(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", {"a": TENSORS["a"]})
    pool = torch.zeros(7, 5, 9)
    rows = [pool[:, :, place].T for place in (8, 0, 3)]
    reader.read(file, {"a": rows})
    assert all(torch.equal(row, want) for row, want in zip(rows, TENSORS["a"], strict=True))
    assert not pool[:, :, [1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_cast_as_torch_casts_them(tmp_path: Path, reader: CheckedReader, dtype: torch.dtype) -> None:
    file = written(tmp_path / "x", {"a": TENSORS["a"]})
    got = torch.zeros(3, 5, 7, dtype=dtype)
    reader.read(file, {"a": got})
    assert torch.equal(got, TENSORS["a"].to(dtype))


def test_large_tensors_are_read_in_pieces_of_whole_lines(tmp_path: Path, reader: CheckedReader) -> None:
    tensor = torch.from_numpy(np.arange(3 * 700 * 701, dtype=np.float32).reshape(3, 700, 701))
    got = torch.zeros(3, 700, 701)
    reader.read(written(tmp_path / "x", {"a": tensor}), {"a": got})
    assert torch.equal(got, tensor)


def test_sums_are_checked_without_a_place_to_copy_to(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", TENSORS)
    reader.read(file)
    alter(file.path, file.tensors["c"].first_byte + 9)
    with pytest.raises(
        CorruptDeltaError, match=r"x: c: got sha256 [0-9a-f]{12}…, expected [0-9a-f]{12}…\.\nThe file was"
    ):
        reader.read(file)


def test_an_altered_byte_is_found_while_copying(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", TENSORS)
    alter(file.path, file.tensors["a"].end_byte - 1)
    with pytest.raises(CorruptDeltaError, match="x: a: got sha256"):
        reader.read(file, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})


def test_a_wrong_sum_in_an_altered_file_says_that_it_was_altered(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", TENSORS)
    written(file.path, {name: tensor + 1 for name, tensor in TENSORS.items()})
    with pytest.raises(
        DeltaError,
        match=r"x: the file was altered or replaced since the delta was put into service\.\n"
        r"Take the delta out of service and put it in again\.",
    ):
        reader.read(file)


def test_the_same_bytes_in_another_file_are_the_same_delta(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", TENSORS)
    (tmp_path / "y").write_bytes(file.path.read_bytes())
    (tmp_path / "y").replace(file.path)
    os.utime(file.path, ns=(1, 1))
    reader.read(file)


@pytest.mark.parametrize("keeps_time", [True, False])
def test_without_sums_a_file_has_to_be_the_same_one_still(
    tmp_path: Path, reader: CheckedReader, keeps_time: bool
) -> None:
    file = written(tmp_path / "x", TENSORS, has_sums=False)
    if keeps_time:  # another file of the same size and time
        status = file.path.stat()
        (tmp_path / "y").write_bytes(file.path.read_bytes())
        os.utime(tmp_path / "y", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "y").replace(file.path)
    else:
        os.utime(file.path, ns=(1, 1))
    got = torch.zeros(3, 5, 7)
    with pytest.raises(DeltaError, match="the file was altered or replaced"):
        reader.read(file, {**TENSORS, "a": got})
    assert not got.any()


def test_a_file_without_sums_that_is_altered_while_it_is_read_is_refused(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", {"a": TENSORS["a"]}, has_sums=False)

    class Touching:
        """A place that somebody writes the file at the same time as."""

        shape = (3, 5, 7)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            if index > 2:
                raise IndexError
            os.utime(file.path, ns=(1, 1))
            return torch.zeros(5, 7)

    with pytest.raises(DeltaError, match="the file was altered or replaced"):
        reader.read(file, {"a": Touching()})  # type: ignore[dict-item]


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", {"a": TENSORS["a"]})
    status = file.path.stat()
    os.truncate(file.path, status.st_size - 4)
    with pytest.raises(DeltaError, match="the file was altered or replaced"):
        reader.read(file)
    short = TensorFile(path=file.path, tensors=file.tensors, sums=file.sums, stamp=FileStamp.of(file.path))
    with pytest.raises(CorruptDeltaError, match="x: a: got a file that is cut off"):
        reader.read(short)


def test_a_file_that_is_gone_is_refused(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", TENSORS)
    file.path.unlink()
    with pytest.raises(DeltaError, match=r"x: cannot be read \(No such file or directory\)\.\nSee to it"):
        reader.read(file)


@pytest.mark.parametrize(("value", "dtype"), [(70000.0, torch.float16), (float("nan"), torch.bfloat16)])
def test_values_that_are_not_finite_in_the_bases_dtype_are_refused(
    tmp_path: Path, reader: CheckedReader, value: float, dtype: torch.dtype
) -> None:
    tensor = some(3, 4)
    tensor[1, 2] = value
    file = written(tmp_path / "x", {"a": tensor})
    with pytest.raises(DeltaError, match=rf"x: a: the delta holds values that are not finite in {dtype}"):
        reader.read(file, {"a": torch.zeros(3, 4, dtype=dtype)})


def test_without_sums_values_have_to_be_finite_in_any_dtype(tmp_path: Path, reader: CheckedReader) -> None:
    file = written(tmp_path / "x", {"a": torch.tensor([1.0, float("inf")])}, has_sums=False)
    with pytest.raises(DeltaError, match="not finite"):
        reader.read(file, {"a": torch.zeros(2)})


def test_large_values_whose_norm_is_not_finite_are_let_pass(tmp_path: Path, reader: CheckedReader) -> None:
    tensor = torch.full((4,), 3e38)
    got = torch.zeros(4, dtype=torch.bfloat16)
    reader.read(written(tmp_path / "x", {"a": tensor}), {"a": got})
    assert torch.equal(got, tensor.to(torch.bfloat16))


def test_once_one_thread_has_failed_nothing_more_is_written(tmp_path: Path, reader: CheckedReader) -> None:
    tensors = {f"t{number}": some(50, number + 1) for number in range(20)}
    file = written(tmp_path / "x", tensors)
    alter(file.path, file.tensors["t19"].first_byte)
    begun: list[str] = []
    ended: list[str] = []
    is_writing = threading.Event()

    class Place:
        """One that takes its time, but for the tensor that fails, which waits for another one to have begun."""

        def __init__(self, name: str) -> None:
            self.name, self.shape = name, tensors[name].shape

        def __len__(self) -> int:
            return self.shape[0]

        def __getitem__(self, index: int) -> Tensor:
            if index == len(self):
                raise IndexError
            if index == 1 and self.name == "t19":
                assert is_writing.wait(10)
            elif index == 1:
                begun.append(self.name)
                is_writing.set()
                time.sleep(0.2)
                ended.append(self.name)
            return torch.zeros(self.shape[1:])

    with pytest.raises(CorruptDeltaError, match="t19"):
        reader.read(file, {name: Place(name) for name in tensors})  # type: ignore[misc]
    assert 1 <= len(begun) == len(ended) < 5
    time.sleep(0.3)
    assert len(begun) == len(ended) < 5


def test_threads_of_torch_stay_as_many_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        reader = CheckedReader()
        counts = [reader._threads.submit(torch.get_num_threads).result() for _ in range(4)]
        reader.close()
        assert counts == [1, 1, 1, 1]
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_threads_come_after_those_that_compute_answers(reader: CheckedReader) -> None:
    def niceness() -> int:
        time.sleep(0.01)  # so that each of the threads is asked
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    asked = [reader._threads.submit(niceness) for _ in range(4)]
    assert [each.result() for each in asked] == [min(19, niceness() + 4)] * 4
