"""The rows of one adapter in one layer, in blocks, on the device, in host memory or on disk.

A row is a neuron of a wide adapter: its key and its value side by side, so that it is one contiguous piece. Rows that
are always used together are a block, one contiguous piece too. An optimizer keeps its state in arrays beside the rows,
on the same tier, and writes rows in place.

Where the device that computes can address the store (one on the device itself, and on a CPU every store), blocks are
views and nothing is copied. Elsewhere they are fetched, and some kept: see `device_rows.py`.
"""

# N blocks, M rows a block, D hidden_size, A blocks that are asked for

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metier.errors import ConfigError, RowStoreError
from metier.memory.device_rows import DeviceRows, HotBlocks
from metier.memory.disk_cache import CachedFile, disk_cache
from metier.memory.disk_policy import Kind, Phase
from metier.memory.mapped_file import create_mapped
from metier.memory.meter import Meter
from metier.memory.scratch_folder import warn_if_in_memory

Tier = Literal["device", "host", "disk"]
TIERS: tuple[str, ...] = get_args(Tier)


class RowStore:
    """Rows of shape (N, M, 2, D): `[…, 0, :]` are keys and `[…, 1, :]` values.

    Args:
        num_blocks, rows_per_block, hidden_size: N, M, D.
        tier: "device" (they move to the device that first asks for blocks), "host" or "disk".
        dtype: float32, or bfloat16 to be trained with stochastic rounding.
        folder: where a store on disk puts its files; without it, a temporary one that goes with the store.
        name: of the store, in file names and messages.
        cache_bytes: on a device that cannot address the store, for blocks that are kept across steps.
        is_remote: treat every device as one that cannot address the store, the CPU too: to measure what would move.
        device: where the rows are made; "meta" for a store that is there to be counted.

    Raises:
        ConfigError: an unknown tier or dtype.
        RowStoreError: the disk has no room for the rows.
    """

    def __init__(
        self,
        num_blocks: int,
        rows_per_block: int,
        hidden_size: int,
        *,
        tier: str = "device",
        dtype: torch.dtype = torch.float32,
        folder: str | Path | None = None,
        name: str = "rows",
        cache_bytes: int = 0,
        is_remote: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if tier not in TIERS:
            raise ConfigError(f"{name}: tier must be one of {', '.join(TIERS)}, got {tier!r}.")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"{name}: rows must be torch.float32 or torch.bfloat16, got {dtype}.")
        self.tier, self.name, self.dtype = tier, name, dtype
        self.num_blocks, self.rows_per_block, self.hidden_size = num_blocks, rows_per_block, hidden_size
        self.cache_bytes, self.is_remote = cache_bytes, is_remote
        self.meter = Meter(num_blocks, rows_per_block * 2 * hidden_size * dtype.itemsize)
        self.num_changes = 0
        """How often an optimizer or a load has changed rows: a backward pass belongs to those of its forward one."""
        self._asked: set[int] = set()
        """Blocks that the step has asked for, where they may have to be moved for it."""
        self.copied: set[int] = set()
        """Those that were copied to a device for the step."""
        self.on_device: DeviceRows | None = None
        """What of the store is on the device that computes, where that cannot address the store."""
        self.hot_to_be: HotBlocks | None = None
        """Blocks that a resumed run had on its device, which will have them once it is known."""
        self.before_use: Callable[[Sequence[int] | None], None] | None = None
        """Called with the blocks that are about to be read (None: all), by an optimizer that owes them updates."""
        self._temporary = tempfile.TemporaryDirectory(prefix="metier-") if tier == "disk" and folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary else Path(folder or ".")
        if tier == "disk" and torch.device(device).type == "cpu":
            warn_if_in_memory(self._folder, "store_folder, or a run's output_dir")
        self.arrays: dict[str, Tensor] = {}
        """The rows, and what an optimizer keeps beside them; the first axis of each counts rows."""
        self._files: dict[str, CachedFile] = {}
        self.last_used: Sequence[int] = ()
        """The blocks that were asked for last; the next pass will ask for much the same."""
        self._neighbours: dict[Phase, RowStore] = {}
        self.layer_place = (0, 1)
        """Which store this is of those that a step passes through, and how many they are."""
        self.gradients: Tensor | None = None
        """Room for those of all blocks, where that is not in memory and was asked for."""
        self._is_read_through = False
        self.arrays["rows"] = self._zeros("rows", (self.num_rows, 2, hidden_size), dtype, torch.device(device))

    @property
    def rows_NMWD(self) -> Tensor:
        """All rows where the store is; what is written into them is the store's."""
        return self.arrays["rows"].view(self.num_blocks, self.rows_per_block, 2, self.hidden_size)

    @property
    def num_rows(self) -> int:
        return self.num_blocks * self.rows_per_block

    @property
    def device(self) -> torch.device:
        return self.rows_NMWD.device

    def add_array(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An array of zeros beside the rows, on the same tier.

        Raises:
            RowStoreError: the disk has no room for it.
        """
        self.arrays[name] = self._zeros(name, shape, dtype, self.arrays["rows"].device)
        return self.arrays[name]

    def gradient_room(self, device: torch.device) -> Tensor | None:
        """Room for the gradients of all blocks, for a store whose rows do not fit into memory; None for others.

        Raises:
            RowStoreError: the disk has no room for it.
        """
        if self.tier != "disk" or device.type != "cpu" or self.is_remote:
            return None
        if self.gradients is None:
            shape = (self.num_rows, 2, self.hidden_size)
            self.gradients = self._zeros("gradients", shape, torch.float32, device)
        return self.gradients

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.tier == "disk" and device.type == "cpu":
            mapped = create_mapped(self._folder / f"{self.name}.{name}", shape, dtype)
            # what is smaller than a page shares it with others, and is left to the system
            if mapped.tensor[: self.rows_per_block].nbytes >= mmap.PAGESIZE:
                kind: Kind = "rows" if name == "rows" else "gradients" if name == "gradients" else "state"
                self._files[name] = CachedFile(mapped, kind, self, self.meter, self.rows_per_block)
            return mapped.tensor
        return torch.zeros(shape, dtype=dtype, device=device)

    def array(self, name: str) -> Tensor:
        return self.arrays[name]

    def home_rows(self, block: int) -> Tensor:
        """One block where the store is, (M, 2, D)."""
        return self.arrays["rows"][block * self.rows_per_block : (block + 1) * self.rows_per_block]

    def move_to(self, device: torch.device) -> None:
        """Take a store of the tier "device" to the device that computes; others stay where they are."""
        if self.tier == "device" and self.device != device:
            self.arrays = {name: array.to(device) for name, array in self.arrays.items()}

    def __deepcopy__(self, _: object) -> RowStore:
        raise RowStoreError(
            f"{self.name}: rows in a store cannot be copied with their model (copy.deepcopy); nothing was.\nSave the "
            "adapter by save_pretrained, and load it again on another model."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.tier == "disk":
            raise RowStoreError(
                f"{self.name}: rows on disk cannot be pickled with their model (torch.save); nothing was.\nSave the "
                "adapter by save_pretrained, or the model's state_dict."
            )
        return super().__reduce_ex__(protocol)

    @torch.inference_mode(False)
    @torch.no_grad()
    def settle(self, block_ids: Sequence[int] | None) -> None:
        """Have an optimizer that owes blocks (None: all) updates do them. In whatever mode: what an evaluation
        makes here, a later training goes on with."""
        if self.before_use is not None:
            self.before_use(block_ids)

    @torch.inference_mode(False)
    @torch.no_grad()
    def blocks(
        self, block_ids: Sequence[int], device: torch.device, *, keep: bool, phase: Phase = "forward"
    ) -> Sequence[Tensor]:
        """The blocks of those numbers, each (M, 2, D) on `device`: views of the store if that can address it.

        Args:
            block_ids: which, each once.
            device: that computes.
            keep: whether they will be asked for again before the optimizer's next step, as in training.
            phase: of the step.
        """
        self.move_to(device)
        if keep and (self.tier == "disk" or self.is_remote or self.device != device):
            self._asked.update(block_ids)
        self.expect(in_order=False)
        self.come_to(phase)
        self.wanted(block_ids)
        self.wait_for()
        if (next_store := self._neighbours.get(phase)) is not None:
            # a backward pass asks for what the forward one has; what that will ask for is not known yet, but is much
            # the same as last time
            next_store.wanted(next_store.last_used)
        self.last_used = block_ids
        if self.device != device or self.is_remote:
            self._meet(device)
        self.settle(block_ids)
        if self.device == device and not self.is_remote:
            if self.on_device is not None:  # the model has come back from another device, with what was kept there
                self.leave_device()
            return [self.home_rows(block) for block in block_ids]
        assert self.on_device is not None, "met above"
        return self.on_device.blocks(block_ids, keep=keep)

    def _meet(self, device: torch.device) -> None:
        """Have a place on a device that cannot address the store."""
        if self.on_device is None or self.on_device.device != device:
            self.write_back()
            self.on_device = DeviceRows(self, device, self.cache_bytes)
        if self.hot_to_be is not None:
            self.on_device.take_on(self.hot_to_be)
            self.hot_to_be = None

    @property
    def _read(self) -> set[int]:
        """Blocks whose rows came from the disk for the step."""
        return self._files["rows"].read if "rows" in self._files else set()

    def begin_step(self) -> None:
        """What moved before, for an evaluation or a checkpoint, is no part of the step."""
        for counted in (self._asked, self.copied, self._read):
            counted.clear()

    def end_step(self, block_ids: Sequence[int]) -> None:
        """An optimizer has updated rows of these blocks."""
        self.num_changes += 1
        self.meter.num_asked += len(self._asked)
        self.meter.num_moved += len(self._asked & (self.copied | self._read))
        self.begin_step()
        if self.on_device is not None:
            self.on_device.end_step(block_ids)

    def hot(self) -> HotBlocks | None:
        """Blocks that a device keeps, or will keep when it is asked for some; None where there was none yet."""
        if self.hot_to_be is not None or self.on_device is None:
            return self.hot_to_be
        return self.on_device.hot()

    def write_back(self) -> None:
        """Bring the arrays up to date with blocks that are kept on a device."""
        if self.on_device is not None:
            self.on_device.write_back()

    def leave_device(self) -> None:
        """Keep nothing on a device any more: what is kept beside the rows is about to be another."""
        self.write_back()
        self.on_device = self.hot_to_be = None

    def forget_copies(self) -> None:
        """The arrays were written from outside; what is on a device is no copy of them any more."""
        if self.on_device is not None:
            self.on_device.forget()

    def come_to(self, phase: Phase) -> None:
        """A step begins with this store's part in a phase."""
        if self.tier == "disk":
            disk_cache().come_to(phase, self)

    def wanted(self, block_ids: Sequence[int], names: Iterable[str] = ("rows",), *, to_write: bool = False) -> None:
        """Blocks will be asked for soon: the disk is to read them; other tiers need no such thing."""
        for name in names:
            if name in self._files:
                disk_cache().wanted(self._files[name], block_ids, to_write=to_write)

    def expect(self, *, in_order: bool) -> None:
        """All will be read from end to end, to be saved; or blocks again, which is told of at the next use anyway."""
        if in_order != self._is_read_through:
            self._is_read_through = in_order
            for file in self._files.values():
                file.file.expect(in_order=in_order)

    def wait_for(self, names: Iterable[str] = ("rows",)) -> None:
        """Until all that was wanted is there."""
        started = time.perf_counter()
        for name in names:
            if name in self._files:
                disk_cache().wait_for(self._files[name])
        self.meter.stall_seconds += time.perf_counter() - started

    def wait_until_written(self) -> None:
        """Until the disk has taken all that it was given.

        Raises:
            RowStoreError: it could not, and something is lost.
        """
        if self._files:
            disk_cache().wait_until_written()

    def changed(self, block_ids: Sequence[int], names: Iterable[str] | None = None) -> None:
        """Blocks were written in place, and all (or `names`) that is kept beside them: the disk is to have them."""
        for name in self.arrays if names is None else names:
            if name in self._files:
                disk_cache().written(self._files[name], block_ids)

    def forget_gradients(self, num_blocks: int) -> None:
        """What is in the first blocks of their room is not wanted any more."""
        if num_blocks and "gradients" in self._files:
            disk_cache().forget(self._files["gradients"], num_blocks)

    @torch.no_grad()
    def load(self, rows_RWD: Tensor) -> None:
        """Take on rows of shape (N * M, 2, D), block by block.

        Raises:
            RowStoreError: another shape.
        """
        expected = (self.num_rows, 2, self.hidden_size)
        if tuple(rows_RWD.shape) != expected:
            raise RowStoreError(
                f"{self.name}: got rows of shape {list(rows_RWD.shape)}, expected {list(expected)}; those that are "
                "here stay.\nThe rows are of another adapter: load them into one of their configuration."
            )
        self.num_changes += 1
        # else what the former rows are owed would be added to these; moments and counts of hot ones stay
        self.settle(None)
        self.write_back()
        for first in range(0, self.num_rows, self.rows_per_block):
            part = slice(first, first + self.rows_per_block)
            self.arrays["rows"][part].copy_(rows_RWD[part])
            self.changed([first // self.rows_per_block])
        self.forget_copies()

    def saved(self) -> Tensor:
        """All rows as (N * M, 2, D), every update done that the optimizer owes; a view where they are on the host.

        Raises:
            RowStoreError: the disk could not take some, which are lost.
        """
        self.settle(None)
        self.write_back()
        self.wait_until_written()
        self.expect(in_order=True)
        return self.arrays["rows"].detach()


def link(stores: Sequence[RowStore]) -> None:
    """Tell stores in which order a model's layers come, so that each has the next one's rows read ahead."""
    for index, store in enumerate(stores):
        store.layer_place = (index, len(stores))
        store._neighbours = {}
        if index:
            store._neighbours["backward"] = stores[index - 1]
        if index + 1 < len(stores):
            store._neighbours["forward"] = stores[index + 1]
