"""What of a store on disk is in memory, and that giving it up loses nothing."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import threading
from types import SimpleNamespace

import pytest
import torch

from metier.distributed.ranks import Ranks
from metier.errors import RowStoreError
from metier.memory import RowAdamW, RowStore, mapped_file, row_store
from metier.memory.disk_cache import BATCH_BYTES, CachedFile, DiskCache
from metier.memory.mapped_file import create_mapped
from metier.memory.meter import Meter
from metier.memory.step_gradients import StepGradients

PIECES, ROWS = 12, 8


class Layer:
    def __init__(self, layer_place):
        self.layer_place = layer_place


@pytest.fixture
def cache(monkeypatch):
    monkeypatch.setattr("metier.memory.disk_cache.BATCH_BYTES", 0)
    return DiskCache(most_bytes=4 * ROWS * 4096)


@pytest.fixture
def file(tmp_path):
    """Makes files of 12 pieces of 8 pages."""

    def make(name: str, kind: str, place=(0, 1)) -> CachedFile:
        mapped = create_mapped(tmp_path / name, (PIECES * ROWS, 1024), torch.float32)
        return CachedFile(mapped, kind, Layer(place), Meter(PIECES), ROWS)

    return make


@pytest.fixture
def can_zero(tmp_path):
    """Some file systems cannot give pages up; there gradients are written over, and that is all."""
    if not (probe := create_mapped(tmp_path / "probe", (4096,), torch.float32)).give_up(probe.tensor):
        pytest.skip("the file system of the temporary folder cannot make pages zero")


def begin(cache, file, phase="forward"):
    for _ in range(3):  # so that nothing is protected any more
        cache.come_to(phase, file.layer)


def settle(cache):
    for pool in (cache._reader, cache._writer):
        pool.submit(lambda: None).result()


def resident_pages(file: CachedFile) -> int:
    """Asks the system."""
    with open(file.file.path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        import ctypes

        vector = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
        address = ctypes.c_void_p(torch.frombuffer(mapped, dtype=torch.uint8).data_ptr())
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), vector) == 0
        return sum(page & 1 for page in vector)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_changed_pieces_that_are_given_up_are_written_and_leave_memory(cache, file):
    one = file("rows", "rows")
    one.file.tensor.copy_(torch.arange(PIECES * ROWS)[:, None].expand(-1, 1024))
    cache.written(one, range(PIECES))
    settle(cache)
    begin(cache, one)
    cache.wanted(one, [0])
    settle(cache)
    assert len(one.last_call) <= 4
    assert 0 in one.last_call
    assert resident_pages(one) <= 4 * ROWS
    assert one.file.tensor[:, 0].tolist() == list(range(PIECES * ROWS))
    assert not one.changed - one.last_call.keys()
    assert one.meter.bytes_to_disk >= (PIECES - 4) * one.piece_bytes


def test_what_is_wanted_last_is_given_up_first(cache, file):
    rows, state = file("rows", "rows", (0, 2)), file("state", "state", (0, 2))
    cache.come_to("optimizer", rows.layer)
    cache.wanted(state, [0, 1])
    cache.wanted(rows, [0, 1])
    begin(cache, rows, "optimizer")
    cache.wanted(rows, [2, 3])
    # moments were asked for before rows and after: age does not decide
    assert list(rows.last_call) == [0, 1, 2, 3]
    assert not state.last_call


def test_what_is_in_use_is_never_given_up(cache, file):
    one = file("rows", "rows")
    cache.come_to("forward", one.layer)
    cache.wanted(one, range(PIECES))
    assert len(one.last_call) == PIECES


def test_rows_larger_than_the_room_are_loaded_within_it(cache, tmp_path, monkeypatch):
    """Nothing has announced them, and no step has begun."""
    monkeypatch.setattr(row_store, "disk_cache", lambda: cache)
    store = RowStore(PIECES, ROWS, 512, tier="disk", folder=tmp_path)
    rows_RWD = torch.arange(PIECES * ROWS * 1024.0).view(PIECES * ROWS, 2, 512)
    store.load(rows_RWD)
    assert cache.num_bytes <= cache.room_bytes()
    settle(cache)
    assert torch.equal(store.saved(), rows_RWD)


def test_updates_that_all_blocks_are_owed_are_done_within_the_room(cache, tmp_path, monkeypatch):
    """As before a checkpoint: each group of blocks may go when the next one comes."""
    monkeypatch.setattr(row_store, "disk_cache", lambda: cache)
    monkeypatch.setattr("metier.memory.step_gradients.GROUP_BYTES", 1)
    cache.most_bytes *= 4  # rows and both moments of a few blocks
    gradients = StepGradients(RowStore(4 * PIECES, ROWS, 512, tier="disk", folder=tmp_path))
    optimizer = RowAdamW([gradients.holder], weight_decay=0.1, mode="exact")
    gradients.store.rows_NMWD.fill_(1)
    gradients.places([0], torch.device("cpu"))[0][0].fill_(1)
    optimizer.step()
    optimizer.state_dict()
    assert cache.num_bytes <= cache.room_bytes()
    assert gradients.store.rows_NMWD[1:].lt(1).all(), "all have decayed"


def test_what_is_wanted_is_there_once_it_was_waited_for(cache, file):
    one = file("rows", "rows")
    cache.come_to("forward", one.layer)
    cache.wanted(one, [3, 5])
    assert one.reading is not None
    cache.wait_for(one)
    assert one.reading is None
    cache.wanted(one, [3, 5])
    assert one.reading is None, "it is there already"


def test_numbers_that_are_not_wanted_any_more_are_zeros_without_being_written(cache, file, can_zero):
    one = file("gradients", "gradients")
    one.file.tensor.fill_(1)
    cache.written(one, [0, 1, 2])
    cache.forget(one, 2)
    settle(cache)
    assert not one.file.tensor[: 2 * ROWS].any()
    assert one.file.tensor[2 * ROWS :].eq(1).all()
    assert list(one.last_call) == [2]
    assert cache.num_bytes == one.piece_bytes


def test_what_is_written_after_others_were_forgotten_stays(tmp_path, monkeypatch, can_zero):
    """The reader is behind when a step begins: the last step's gradients are to go, not this one's."""
    cache, go_on = DiskCache(most_bytes=1 << 20), threading.Event()
    monkeypatch.setattr(row_store, "disk_cache", lambda: cache)
    gradients = StepGradients(RowStore(4, 8, 1024, tier="disk", folder=tmp_path))
    for place in gradients.places([0, 1], torch.device("cpu"))[0]:
        place.fill_(1)
    gradients.holder.grad = None
    cache._reader.submit(go_on.wait)
    gradients.begin()
    threading.Timer(0.3, go_on.set).start()
    for place in gradients.places([0, 1], torch.device("cpu"))[0]:
        place.fill_(2)
    settle(cache)
    assert gradients.holder.grad.eq(2).all()


def test_files_that_are_gone_take_no_room(cache, file):
    one, other = file("one", "rows"), file("other", "rows")
    cache.come_to("forward", one.layer)
    cache.wanted(one, range(PIECES))
    settle(cache)
    cache.wait_for(one)
    del one
    gc.collect()
    begin(cache, other)
    cache.wanted(other, [0, 1, 2, 3])
    begin(cache, other)
    cache.wanted(other, [0])
    assert list(other.last_call) == [1, 2, 3, 0]


def test_room_is_what_the_process_has_not_taken_otherwise(monkeypatch):
    monkeypatch.setattr("metier.memory.disk_cache.memory_limit_bytes", lambda: 10 << 30)
    monkeypatch.setattr("metier.memory.disk_cache.held_bytes", lambda: 2 << 30)
    assert DiskCache().room_bytes() == int(0.85 * (10 << 30)) - (2 << 30)
    monkeypatch.setattr("metier.memory.disk_cache.held_bytes", lambda: 20 << 30)
    assert DiskCache().room_bytes() == BATCH_BYTES


def test_what_the_disk_could_not_take_is_told(cache, file, monkeypatch):
    rows = file("rows", "rows")

    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(mapped_file, "libc", SimpleNamespace(sync_file_range=refuse))

    def write() -> None:
        for piece in range(PIECES):
            begin(cache, rows)
            cache.written(rows, [piece])
            settle(cache)

    with pytest.raises(
        RowStoreError, match=r"rows: the disk could not take 32,768 bytes of a store .*Input/output error"
    ):
        write()


def test_what_is_saved_is_not_what_the_disk_has_lost(cache, tmp_path, monkeypatch):
    saving = threading.Event()

    def refuse(*_: object) -> int:
        saving.wait()
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(row_store, "disk_cache", lambda: cache)
    store = RowStore(PIECES, ROWS, 512, tier="disk", folder=tmp_path)
    store.changed([0, 1])
    for _ in range(3):
        store.come_to("forward")
    monkeypatch.setattr(mapped_file, "libc", SimpleNamespace(sync_file_range=refuse))
    store.changed([2, 3, 4, 5])  # the last that is given up: nobody comes by after it
    assert cache._on_their_way
    saving.set()
    with pytest.raises(RowStoreError, match="the disk could not take"):
        store.saved()


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("metier.memory.disk_cache.memory_limit_bytes", lambda: 1 << 40)
    monkeypatch.setattr("metier.memory.disk_cache.held_bytes", lambda: 0)
    alone = DiskCache().room_bytes()
    monkeypatch.setattr("metier.memory.disk_cache.ranks_here", lambda: Ranks(1, 8, local_size=4))
    assert DiskCache().room_bytes() == pytest.approx(alone / 4, abs=1)
