"""Stores of rows on every tier: views in place, files that are reserved, and what is refused."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch

from metier.errors import ConfigError, RowStoreError
from metier.memory import RowStore, row_store
from metier.memory.disk_cache import DiskCache
from metier.memory.mapped_file import create_mapped, open_mapped
from metier.memory.meter import of_a_step
from metier.memory.row_store import link

CPU = torch.device("cpu")


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_blocks_are_views_of_the_store(tier, tmp_path):
    store = RowStore(4, 3, 5, tier=tier, folder=tmp_path)
    (block,) = store.blocks([2], CPU, keep=True)
    block.fill_(7)
    assert store.rows_NMWD[2].eq(7).all()
    assert store.rows_NMWD[[0, 1, 3]].eq(0).all()
    assert block.is_contiguous()


def test_a_row_is_one_contiguous_piece_of_key_and_value():
    rows = RowStore(4, 3, 5).rows_NMWD
    assert rows[1, 2].is_contiguous()
    assert rows[1, 2, 1].data_ptr() - rows[1, 2, 0].data_ptr() == 5 * 4


def test_a_store_on_disk_keeps_its_numbers_in_its_folder(tmp_path):
    store = RowStore(4, 3, 5, tier="disk", folder=tmp_path / "rows", name="layers.0.mlp")
    store.load(torch.arange(120.0).view(12, 2, 5))
    del store
    path = tmp_path / "rows" / "layers.0.mlp.rows"
    assert open_mapped(path, (12, 2, 5), torch.float32).tensor.flatten().tolist() == list(range(120))


def test_a_store_on_disk_without_a_folder_leaves_nothing_behind():
    store = RowStore(4, 3, 5, tier="disk")
    folder = Path(store._folder)
    assert any(folder.iterdir())
    del store
    assert not folder.exists()


def test_a_full_disk_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RowStoreError, match=r"cannot reserve 480 bytes \(No space left on device\)"):
        RowStore(4, 3, 5, tier="disk", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_one_of_another_store_are_refused(tmp_path):
    with pytest.raises(RowStoreError, match="there is no such file"):
        open_mapped(tmp_path / "rows", (4, 3), torch.float32)
    create_mapped(tmp_path / "rows", (4, 3), torch.float32)
    with pytest.raises(RowStoreError, match=r"holds 48 bytes, expected 80 for float32 \[4, 5\]"):
        open_mapped(tmp_path / "rows", (4, 5), torch.float32)


def test_rows_of_another_shape_are_refused_and_nothing_is_loaded():
    store = RowStore(4, 3, 5)
    with pytest.raises(RowStoreError, match=r"shape \[12, 2, 6\], expected \[12, 2, 5\]"):
        store.load(torch.ones(12, 2, 6))
    assert not store.rows_NMWD.any()


@pytest.mark.parametrize("options", [{"tier": "cloud"}, {"dtype": torch.float16}])
def test_an_unknown_tier_or_dtype_is_refused(options):
    with pytest.raises(ConfigError, match="must be"):
        RowStore(4, 3, 5, **options)


def test_reading_ahead_is_harmless_on_every_tier(tmp_path):
    for tier in ("device", "host", "disk"):
        store = RowStore(4, 3, 500, tier=tier, folder=tmp_path / tier)
        store.rows_NMWD.fill_(3)
        store.wanted([0, 3])
        assert store.rows_NMWD.eq(3).all()


def test_a_folder_that_is_kept_in_memory_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr("metier.memory.scratch_folder.is_in_memory", lambda folder: folder == tmp_path / "default")
    with pytest.warns(UserWarning, match=r"is kept in memory.* Name a folder on a disk: store_folder"):
        RowStore(4, 3, 5, tier="disk", folder=tmp_path / "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RowStore(4, 3, 5, tier="host", folder=tmp_path / "default")
        RowStore(4, 3, 5, tier="disk", folder=tmp_path / "other")


def test_rows_on_disk_are_not_pickled(tmp_path):
    store = RowStore(4, 3, 5, tier="disk", folder=tmp_path, name="layer 0")
    with pytest.raises(
        RowStoreError, match=r"layer 0: rows on disk cannot be pickled .*\nSave the adapter by save_pre"
    ):
        torch.save(store, tmp_path / "copy")
    plain = RowStore(4, 3, 5, tier="host")
    plain.rows_NMWD.fill_(3)
    torch.save(plain, tmp_path / "copy")
    assert torch.load(tmp_path / "copy", weights_only=False).rows_NMWD.eq(3).all()


def test_the_next_layers_rows_are_read_while_one_is_used(tmp_path, monkeypatch):
    cache = DiskCache(most_bytes=1 << 30)
    monkeypatch.setattr(row_store, "disk_cache", lambda: cache)
    stores = [RowStore(4, 8, 512, tier="disk", folder=tmp_path, name=f"layer {i}") for i in range(3)]
    link(stores)
    for store in stores:
        store.last_used = [1, 2]

    def in_memory() -> list[list[int]]:
        found = [sorted(store._files["rows"].last_call) for store in stores]
        for store in stores:
            cache.forget(store._files["rows"], 4)
        return found

    stores[0].blocks([3], CPU, keep=True)
    assert in_memory() == [[3], [1, 2], []]
    stores[1].blocks([0, 2], CPU, keep=True)
    assert in_memory() == [[], [0, 2], [1, 2]]
    stores[2].blocks([1], CPU, keep=True, phase="backward")
    assert in_memory() == [[], [0, 2], [1]]
    stores[1].blocks([2], CPU, keep=True, phase="backward")
    assert in_memory() == [[3], [2], []]


def test_saving_has_owed_updates_done_first():
    store, asked = RowStore(2, 1, 3), []
    store.before_use = asked.append
    store.blocks([1], CPU, keep=True)
    store.saved()
    assert asked == [[1], None]


def test_the_meter_counts_and_begins_again():
    store = RowStore(4, 3, 5)
    store.meter.used([1, 3], [10, 2])
    store.meter.used([1], [5])
    taken = store.meter.take()
    assert (taken.num_blocks_used, taken.tokens_by_block) == (3, [0, 15, 0, 2])
    assert store.meter.tokens_by_block == [0, 0, 0, 0]


@pytest.mark.parametrize("is_slow", [False, True])
def test_the_log_counts_bytes_touched_and_hits_where_rows_move(is_slow):
    store = RowStore(4, 3, 5, is_remote=is_slow)
    for _ in range(2):  # micro-batches of one step
        store.blocks([1, 3], CPU, keep=True)
        store.meter.used([1, 3], [10, 2])
    store.end_step([1, 3])
    store.blocks([1], CPU, keep=True)
    store.meter.used([1], [4])
    store.end_step([1])
    store.blocks([0, 2], CPU, keep=False)  # an evaluation
    store.blocks([2], CPU, keep=False)
    logged = of_a_step([store.meter.take()], 2)
    assert logged["row_bytes_touched"] == 5 * 3 * 2 * 5 * 4 / 2
    assert logged["key_expert_load_max"] == 24 / (28 / 4)
    assert logged["key_experts_unused"] == 0.5
    # all three that two steps asked for had to be fetched; what is addressed in place has no such rate
    assert logged.get("row_cache_hit_rate") == (0.0 if is_slow else None)
    store.blocks([2], CPU, keep=True)
    store.end_step([2])
    assert of_a_step([store.meter.take()], 1).get("row_cache_hit_rate") == (0.0 if is_slow else None)


def test_hits_are_blocks_that_an_earlier_step_has_left(tmp_path, monkeypatch):
    monkeypatch.setattr("metier.memory.disk_cache.BATCH_BYTES", 0)
    cache = DiskCache(most_bytes=4 << 12)
    monkeypatch.setattr(row_store, "disk_cache", lambda: cache)
    store = RowStore(8, 1, 512, tier="disk", folder=tmp_path)
    store.load(torch.ones(8, 2, 512))
    store.meter.take()
    rates = []
    for blocks in ([0, 1], [0, 1], [4, 5], [6, 7], [0, 1]):
        store.blocks(blocks, CPU, keep=True)
        store.end_step(blocks)
        rates.append(of_a_step([store.meter.take()], 1)["row_cache_hit_rate"])
    # what an evaluation reads is no part of the next step
    store.blocks([2, 3], CPU, keep=False)
    store.begin_step()
    store.blocks([2, 3], CPU, keep=True)
    store.end_step([2, 3])
    assert of_a_step([store.meter.take()], 1)["row_cache_hit_rate"] == 1.0
    # the first ones had to go when the last were loaded, and again when others came
    assert rates[1] == 1.0
    assert rates[0] < 1
    assert rates[-1] < 1
