"""The rows of one adapter in one layer, in blocks, on the device, in host memory or on disk.

A row is a neuron of a wide adapter: its key and its value side by side, so that it is one contiguous piece. Rows that
are always used together are a block, one contiguous piece too. An optimizer keeps its state in arrays beside the rows,
on the same tier, and writes rows in place.

Where the device that computes can address the store (one on the device itself, and on a CPU every store), blocks are
views and nothing is copied. Elsewhere they are fetched, and some kept: see `device_rows.py`.
"""

# N blocks, M rows a block, D hidden_size, A blocks that are asked for

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from metier.errors import ConfigError, RowStoreError
from metier.memory.device_rows import DeviceRows
from metier.memory.mapped_file import create_mapped, read_ahead
from metier.memory.meter import Meter

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
    ) -> None:
        if tier not in TIERS:
            raise ConfigError(f"{name}: tier must be one of {', '.join(TIERS)}, got {tier!r}.")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"{name}: rows must be torch.float32 or torch.bfloat16, got {dtype}.")
        self.tier, self.name, self.dtype = tier, name, dtype
        self.num_blocks, self.rows_per_block, self.hidden_size = num_blocks, rows_per_block, hidden_size
        self.cache_bytes, self.is_remote = cache_bytes, is_remote
        self.meter = Meter(num_blocks)
        self.on_device: DeviceRows | None = None
        """What of the store is on the device that computes, where that cannot address the store."""
        self.before_use: Callable[[Sequence[int] | None], None] | None = None
        """Called with the blocks that are about to be read (None: all), by an optimizer that owes them updates."""
        self._temporary = tempfile.TemporaryDirectory(prefix="metier-") if tier == "disk" and folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary else Path(folder or ".")
        self.arrays: dict[str, Tensor] = {}
        """The rows, and what an optimizer keeps beside them; the first axis of each counts rows."""
        self.add_array("rows", (self.num_rows, 2, hidden_size), dtype)

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
        if self.tier == "disk":
            self.arrays[name] = create_mapped(self._folder / f"{self.name}.{name}", shape, dtype)
        else:
            device = self.arrays["rows"].device if self.arrays else torch.device("cpu")
            self.arrays[name] = torch.zeros(shape, dtype=dtype, device=device)
        return self.arrays[name]

    def array(self, name: str) -> Tensor:
        return self.arrays[name]

    def home_rows(self, block: int) -> Tensor:
        """One block where the store is, (M, 2, D)."""
        return self.arrays["rows"][block * self.rows_per_block : (block + 1) * self.rows_per_block]

    def move_to(self, device: torch.device) -> None:
        """Take a store of the tier "device" to the device that computes; others stay where they are."""
        if self.tier == "device" and self.device != device:
            self.arrays = {name: array.to(device) for name, array in self.arrays.items()}

    @torch.no_grad()
    def blocks(self, block_ids: Sequence[int], device: torch.device, *, keep: bool) -> Sequence[Tensor]:
        """The blocks of those numbers, each (M, 2, D) on `device`: views of the store if that can address it.

        Args:
            block_ids: which, each once.
            device: that computes.
            keep: whether they will be asked for again before the optimizer's next step, as in training.
        """
        self.move_to(device)
        if self.before_use is not None:
            self.before_use(block_ids)
        if self.device == device and not self.is_remote:
            return [self.home_rows(block) for block in block_ids]
        if self.on_device is None or self.on_device.device != device:
            self.write_back()
            self.on_device = DeviceRows(self, device, self.cache_bytes)
        return self.on_device.blocks(block_ids, keep=keep)

    def end_step(self, block_ids: Sequence[int]) -> None:
        """An optimizer has updated rows of these blocks."""
        if self.on_device is not None:
            self.on_device.end_step(block_ids)

    def write_back(self) -> None:
        """Bring the arrays up to date with blocks that are kept on a device."""
        if self.on_device is not None:
            self.on_device.write_back()

    def forget_copies(self) -> None:
        """The arrays were written from outside; what is on a device is no copy of them any more."""
        if self.on_device is not None:
            self.on_device.forget()

    def read_ahead(self, block_ids: Sequence[int]) -> None:
        """Have the disk read blocks that will be asked for soon; other tiers need no such thing."""
        if self.tier == "disk":
            for block in block_ids:
                read_ahead(self.home_rows(block))

    @torch.no_grad()
    def load(self, rows_RWD: Tensor) -> None:
        """Take on rows of shape (N * M, 2, D), block by block.

        Raises:
            RowStoreError: another shape.
        """
        expected = (self.num_rows, 2, self.hidden_size)
        if tuple(rows_RWD.shape) != expected:
            raise RowStoreError(
                f"{self.name}: got rows of shape {list(rows_RWD.shape)}, expected {list(expected)}; nothing was loaded."
            )
        for first in range(0, self.num_rows, self.rows_per_block):
            part = slice(first, first + self.rows_per_block)
            self.arrays["rows"][part].copy_(rows_RWD[part])
        self.forget_copies()

    def saved(self) -> Tensor:
        """All rows as (N * M, 2, D), every update done that the optimizer owes; a view where they are on the host."""
        if self.before_use is not None:
            self.before_use(None)
        self.write_back()
        return self.arrays["rows"].detach()
