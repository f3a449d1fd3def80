"""The rows of one adapter in one layer, in blocks, on the device, in host memory or on disk.

A row is a neuron of a wide adapter: its key and its value side by side, so that it is one contiguous piece. Rows that
are always used together are a block, one contiguous piece too. An optimizer keeps its state in arrays beside the rows,
on the same tier, and writes rows in place.

Where the device that computes can address the store (one on the device itself, and on a CPU every store), blocks are
views and nothing is copied. Elsewhere they are staged: see `staging.py`.
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
    ) -> None:
        if tier not in TIERS:
            raise ConfigError(f"{name}: tier must be one of {', '.join(TIERS)}, got {tier!r}.")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"{name}: rows must be torch.float32 or torch.bfloat16, got {dtype}.")
        self.tier, self.name, self.dtype = tier, name, dtype
        self.num_blocks, self.rows_per_block, self.hidden_size = num_blocks, rows_per_block, hidden_size
        self.meter = Meter(num_blocks)
        self.before_use: Callable[[Sequence[int] | None], None] | None = None
        """Called with the blocks that are about to be read (None: all), by an optimizer that owes them updates."""
        self._temporary = tempfile.TemporaryDirectory(prefix="metier-") if tier == "disk" and folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary else Path(folder or ".")
        self._arrays: dict[str, Tensor] = {}
        self.add_array("rows", (num_blocks, rows_per_block, 2, hidden_size), dtype)

    @property
    def rows_NMWD(self) -> Tensor:
        """All rows; what is written into them is the store's."""
        return self._arrays["rows"]

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
            self._arrays[name] = create_mapped(self._folder / f"{self.name}.{name}", shape, dtype)
        else:
            device = self._arrays["rows"].device if self._arrays else torch.device("cpu")
            self._arrays[name] = torch.zeros(shape, dtype=dtype, device=device)
        return self._arrays[name]

    def array(self, name: str) -> Tensor:
        return self._arrays[name]

    def move_to(self, device: torch.device) -> None:
        """Take a store of the tier "device" to the device that computes; others stay where they are."""
        if self.tier == "device" and self.device != device:
            self._arrays = {name: array.to(device) for name, array in self._arrays.items()}

    def is_addressable_from(self, device: torch.device) -> bool:
        return self.device == device

    @torch.no_grad()
    def blocks(self, block_ids: Sequence[int], device: torch.device) -> Sequence[Tensor]:
        """The blocks of those numbers, each (M, 2, D), as views of the store.

        Raises:
            RowStoreError: `device` cannot address the store.
        """
        self.move_to(device)
        if not self.is_addressable_from(device):
            raise RowStoreError(f"{self.name}: rows lie on {self.device} and cannot be read from {device} in place.")
        if self.before_use is not None:
            self.before_use(block_ids)
        return [self.rows_NMWD[block] for block in block_ids]

    def read_ahead(self, block_ids: Sequence[int]) -> None:
        """Have the disk read blocks that will be asked for soon; other tiers need no such thing."""
        if self.tier == "disk":
            for block in block_ids:
                read_ahead(self.rows_NMWD[block])

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
        blocks = rows_RWD.view(self.num_blocks, self.rows_per_block, 2, self.hidden_size)
        for block in range(self.num_blocks):
            self.rows_NMWD[block].copy_(blocks[block])

    def saved(self) -> Tensor:
        """All rows as (N * M, 2, D), every update done that the optimizer owes; a view where they are on the host."""
        if self.before_use is not None:
            self.before_use(None)
        return self.rows_NMWD.detach().view(self.num_rows, 2, self.hidden_size)
