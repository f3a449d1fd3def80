"""The weights of one frozen layer or stack of experts, in bytes, on the device, in host memory or on disk.

They are read and never written again. A step passes through a model's layers forward and backward, so a store on disk
knows what comes next: while one layer is computed, the next one's weights are read (`disk_cache.py`).
"""

# E weights of a stack (1 where there is none), O outputs, I inputs, N weights that are asked for, B bytes of one

from __future__ import annotations

import mmap
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from metier.errors import ConfigError
from metier.memory.disk_cache import CachedFile, disk_cache
from metier.memory.disk_policy import Phase
from metier.memory.mapped_file import create_mapped
from metier.memory.meter import Meter
from metier.memory.row_store import TIERS
from metier.memory.weight_formats import weight_format


class FrozenStore:
    """Weights of shape (E, O, I), or one of shape (O, I).

    Args:
        name: of the weight in the model, in file names and messages.
        shape: two or three sizes.
        dtype: that products want.
        tier: "device" (moves to the device that first reads), "host" or "disk".
        format_name: "int8" or "nf4"; None keeps the numbers as they are.
        folder: where a store on disk puts its file, which goes with the store, whatever ends the process.
        layer: whose weights these are.

    Raises:
        ConfigError: an unknown tier or format, or a format's library is missing.
        RowStoreError: the disk has no room.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        tier: str,
        format_name: str | None,
        folder: Path,
        layer: FrozenLayer,
    ) -> None:
        if tier not in TIERS:
            raise ConfigError(f"store: must be one of {', '.join(TIERS)}, got {tier!r}.")
        assert len(shape) in (2, 3), f"{name}: {shape} is no weight of a linear layer, nor a stack of them"
        self.name, self.shape, self.dtype, self.layer = name, shape, dtype, layer
        self.tier, self.format_name = tier, format_name
        self.num_weights = shape[0] if len(shape) == 3 else 1
        self.format = weight_format(format_name, (shape[-2], shape[-1]), dtype)
        self.meter = Meter(self.num_weights)
        self.last_read: Sequence[int] = range(self.num_weights)
        """What a pass read last; the next one will read much the same."""
        self._file: CachedFile | None = None
        layer.add(self)
        sizes = (self.num_weights, self.format.num_bytes)
        if tier == "disk":
            mapped = create_mapped(folder / f"{name}.weights", sizes, torch.uint8)
            mapped.path.unlink()  # the system keeps the file as long as it is mapped
            self._bytes_EB = mapped.tensor
            # what is smaller than a page shares it with others, and is left to the system
            if self.format.num_bytes >= mmap.PAGESIZE:
                self._file = CachedFile(mapped, "weights", layer, self.meter, rows_per_piece=1)
        else:
            # on the way to the device they pass once
            is_sent_often = tier == "host" and torch.cuda.is_available()
            self._bytes_EB = torch.empty(sizes, dtype=torch.uint8, pin_memory=is_sent_often)

    @property
    def num_bytes(self) -> int:
        return self._bytes_EB.nbytes

    @property
    def where(self) -> str:
        """Where the weights are and in which format, in words."""
        return where_stored(self.tier, self.format_name)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Take on the weights, of the store's shape."""
        assert tuple(weight.shape) == self.shape, f"{self.name}: got {tuple(weight.shape)}, expected {self.shape}"
        stack_EOI = weight.detach().view(self.num_weights, *self.shape[-2:])
        for index, weight_OI in enumerate(stack_EOI):
            self.format.encode(weight_OI.to(self.dtype), self._bytes_EB[index])
            if self._file is not None:
                disk_cache().written(self._file, [index])

    def read(self, first: int, last: int, device: torch.device) -> Tensor:
        """The weights `first` to `last - 1` on a device, (N, O, I); a view of the store where that is possible."""
        self._want(range(first, last))
        return self.format.decode(self._on(device)[first:last].to(device, non_blocking=True))

    def read_some(self, indices: Sequence[int], device: torch.device) -> list[Tensor]:
        """Each of those weights, (O, I), wherever it lies on the device; so that nothing else is read."""
        self._want(indices)
        bytes_EB = self._on(device)
        return [self.format.decode(bytes_EB[i : i + 1].to(device, non_blocking=True))[0] for i in indices]

    def announce(self) -> None:
        """Have the disk read what the last pass did."""
        if self._file is not None:
            disk_cache().wanted(self._file, self.last_read)

    def done(self) -> None:
        """The step has gone on to another layer."""
        if self._file is not None:
            disk_cache().done_with(self._file)

    @property
    def read_bytes(self) -> int:
        """What `announce` asks for."""
        return 0 if self._file is None else len(self.last_read) * self.format.num_bytes

    def _on(self, device: torch.device) -> Tensor:
        if self.tier == "device" and self._bytes_EB.device != device:
            self._bytes_EB = self._bytes_EB.to(device)
        return self._bytes_EB

    def _want(self, indices: Sequence[int]) -> None:
        if self._file is None:
            return
        with disk_cache().lock:
            self.layer.arrive()
            disk_cache().wanted(self._file, indices)
            self.last_read = self.layer.read_in_pass(self, indices)
        started = time.perf_counter()
        disk_cache().wait_for(self._file)
        self.meter.stall_seconds += time.perf_counter() - started


class FrozenLayer:
    """One layer's frozen weights, and its place among a model's."""

    def __init__(self, order: FrozenOrder) -> None:
        self.order, self.number = order, len(order.layers)
        order.layers.append(self)
        # weights keep their stores and those the layers: else a model's memory would stay until cycles are collected
        self._stores: list[weakref.ref[FrozenStore]] = []
        self._in_pass: weakref.WeakKeyDictionary[FrozenStore, set[int]] = weakref.WeakKeyDictionary()

    def add(self, store: FrozenStore) -> None:
        """One more of the layer's weights."""
        self._stores.append(weakref.ref(store))

    @property
    def stores(self) -> list[FrozenStore]:
        """Those that are still in use."""
        return [store for made in self._stores if (store := made()) is not None]

    @property
    def layer_place(self) -> tuple[int, int]:
        return self.number, len(self.order.layers)

    def arrive(self) -> None:
        """Somebody reads a weight of this layer: the first time in a pass, have this layer and the next one read."""
        phase: Phase = "backward" if is_in_backward() else "forward"
        if self.order.now == (phase, self.number):
            return
        layers = self.order.layers
        if self.order.now is not None:
            for store in layers[self.order.now[1]].stores:
                store.done()
        self.order.now = (phase, self.number)
        self._in_pass.clear()
        disk_cache().come_to(phase, self)
        following = self.number + (1 if phase == "forward" else -1)
        wanted = [self, *layers[following : following + 1]] if following >= 0 else [self]
        room = disk_cache().room_bytes()
        for layer in wanted:
            # what there is no room for beside this layer is not read before it is used
            room -= sum(store.read_bytes for store in layer.stores)
            if layer is self or room >= 0:
                for store in layer.stores:
                    store.announce()

    def read_in_pass(self, store: FrozenStore, indices: Sequence[int]) -> Sequence[int]:
        """All that was read of a store since the pass came to this layer."""
        read = self._in_pass.setdefault(store, set())
        read.update(indices)
        return sorted(read)


class FrozenOrder:
    """A model's layers with frozen weights, in the order of a forward pass, and where a step is."""

    def __init__(self) -> None:
        self.layers: list[FrozenLayer] = []
        self.now: tuple[Phase, int] | None = None


def is_in_backward() -> bool:
    """Whether autograd is at work: what runs forward then computes a layer again, on the way back."""
    # torch has no public way to ask; transformers and FSDP ask so too
    return torch._C._current_graph_task_id() != -1


def where_stored(tier: str, format_name: str | None) -> str:
    """Where weights are and in which format, in words."""
    place = "on disk" if tier == "disk" else f"on the {tier}"
    return place if format_name is None else f"{place} in {format_name}"
