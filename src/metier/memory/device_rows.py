"""Blocks of a store on a device that cannot address it: fetched once a step, and the hottest kept across steps.

Fetched blocks are copies of rows alone and good until the next optimizer step, however many micro-batches it has. Hot
blocks are moved with all their arrays, so that they are updated on the device and their rows never travel; they go back
when others take their place, and when the store is saved.
"""

# M rows a block

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metier.memory.hot_policy import HotPolicy
from metier.memory.staging_ring import staging_ring

if TYPE_CHECKING:
    from metier.memory.row_store import RowStore


@dataclass(frozen=True, slots=True)
class HotBlocks:
    """Which blocks are kept, in which slots, and why: a run's state, for it decides where they are updated."""

    slots: dict[int, int]
    uses: dict[int, float]


class DeviceRows:
    """What of a store is on a device.

    Args:
        store: whose blocks.
        device: that computes.
        cache_bytes: for hot blocks, their optimizer state included.
    """

    def __init__(self, store: RowStore, device: torch.device, cache_bytes: int) -> None:
        self.store, self.device, self.cache_bytes = store, device, cache_bytes
        self.slots: dict[int, int] = {}
        """Hot blocks, and where in `array` each lies, counted in blocks."""
        self._policy = HotPolicy(0)
        self._arrays: dict[str, Tensor] = {}
        self._fetched: dict[int, Tensor] = {}
        self._ring = staging_ring(device)
        # what a bank of rows has, for `RowState` and `RowChunks`
        self.rows_per_block, self.hidden_size, self.dtype = store.rows_per_block, store.hidden_size, store.dtype

    @property
    def num_rows(self) -> int:
        return self._policy.capacity * self.rows_per_block

    def array(self, name: str) -> Tensor:
        """Of the hot blocks, by their slots."""
        return self._arrays[name]

    def blocks(self, block_ids: Sequence[int], *, keep: bool) -> list[Tensor]:
        """Each (M, 2, D) on the device; what is not there yet is fetched, and kept until the next step if wanted."""
        started, meter = time.perf_counter(), self.store.meter
        missing = [block for block in block_ids if block not in self.slots and block not in self._fetched]
        meter.num_fetched += len(missing)
        fetched = dict(zip(missing, self._fetch(missing), strict=True))
        if keep:
            self._fetched |= fetched
            self.store.copied.update(missing)
        found = self._fetched | fetched
        meter.stall_seconds += time.perf_counter() - started
        rows_per_block = self.rows_per_block
        return [
            self.array("rows")[slot * rows_per_block : (slot + 1) * rows_per_block]
            if (slot := self.slots.get(block)) is not None
            else found[block]
            for block in block_ids
        ]

    @torch.no_grad()
    def end_step(self, block_ids: Sequence[int]) -> None:
        """The optimizer has updated these blocks where they live: what was fetched is old, and places may change."""
        self._fetched = {}
        if self.cache_bytes:
            self._match_arrays()
            self._policy.used(block_ids)
            given_up, taken = self._policy.changes(self.slots)
            for block in given_up:
                self._copy(block, self.slots[block], to_device=False)
                del self.slots[block]
            free = [slot for slot in range(self._policy.capacity) if slot not in set(self.slots.values())]
            for block, slot in zip(taken, free, strict=False):
                self.slots[block] = slot
                self._copy(block, slot, to_device=True)

    def hot(self) -> HotBlocks:
        """What another one takes on to go on as this one would."""
        return HotBlocks(dict(self.slots), self._policy.uses)

    @torch.no_grad()
    def take_on(self, hot: HotBlocks) -> None:
        """Keep those blocks in those slots, as far as there are as many; what they hold is the store's."""
        if self.cache_bytes:
            self.write_back()
            self._match_arrays()
            self._policy = HotPolicy(self._policy.capacity, hot.uses)
            self.slots = {block: slot for block, slot in hot.slots.items() if slot < self._policy.capacity}
            for block, slot in self.slots.items():
                self._copy(block, slot, to_device=True)

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring the store up to date; the hot blocks stay."""
        for block, slot in self.slots.items():
            self._copy(block, slot, to_device=False)

    def forget(self) -> None:
        """The store was written from outside: nothing here is true any more."""
        self.slots, self._fetched = {}, {}

    def _fetch(self, block_ids: Sequence[int]) -> Sequence[Tensor]:
        if not block_ids:
            return []
        fetched = self._ring.send([self.store.home_rows(block) for block in block_ids])
        self.store.meter.bytes_to_device += fetched.nbytes
        return fetched.unbind(0)

    def _match_arrays(self) -> None:
        """Make room for hot blocks with every array that the store has by now; an optimizer adds its own."""
        home = self.store.arrays
        if self._arrays.keys() == home.keys():
            return
        self.write_back()
        self.slots = {}
        block_bytes = sum(array.nbytes for array in home.values()) // self.store.num_blocks
        self._policy = HotPolicy(min(self.store.num_blocks, self.cache_bytes // block_bytes))
        num_rows = self._policy.capacity * self.rows_per_block
        self._arrays = {
            name: torch.zeros(num_rows, *array.shape[1:], dtype=array.dtype, device=self.device)
            for name, array in home.items()
        }

    def _copy(self, block: int, slot: int, *, to_device: bool) -> None:
        rows_per_block = self.rows_per_block
        here = slice(slot * rows_per_block, (slot + 1) * rows_per_block)
        home = slice(block * rows_per_block, (block + 1) * rows_per_block)
        for name, array in self._arrays.items():
            if to_device:
                array[here].copy_(self.store.arrays[name][home])
                self.store.meter.bytes_to_device += array[here].nbytes
            else:
                self.store.arrays[name][home].copy_(array[here])
                self.store.meter.bytes_from_device += array[here].nbytes
