"""A delta as it is served: which tensors it has in the base's dtypes, and the one way to them, by their sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from metier.deltas.tensors_file import StoredTensor
from metier.serving.checked_reader import CheckedReader, Rows, TensorFile

Kind = Literal["esft", "expert_lora", "lora"]
MERGE_INSTEAD = "Merge it into its base (`metier export --to merged`), and serve the merged model as a base of its own."
"""The next step in errors about deltas that cannot be served beside others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTensor:
    """One tensor of a delta, without its values."""

    name: str
    """In the file."""
    path: str
    """Of the base's module that it changes: an experts module, or a linear layer."""
    layer: int | None
    """Decoder layer of the experts; None in a LoRA."""
    parameter: str
    """The base's stacked parameter that it replaces rows of; `up_A`, `up_B`, `down_A`, `down_B`; or `A`, `B`."""
    stored: StoredTensor
    dtype: torch.dtype
    """The base's, in which it is served."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def num_bytes(self) -> int:
        """As it is served; on the disk it may be in a wider dtype."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedDelta:
    """A delta that fits its base. Its values are on the disk, or in `loaded`."""

    kind: Kind
    folder: Path
    file: TensorFile
    reader: CheckedReader
    tensors: tuple[ServedTensor, ...]
    experts: dict[int, tuple[int, ...]]
    """Expert ids by decoder layer: index i of the first axis of a layer's tensors is the i-th. None in a LoRA."""
    scales: dict[str, tuple[float, ...]]
    """By module path, what `B A` is multiplied by: one for each expert, or the one of a linear layer. None in an ESFT
    delta."""
    loaded: dict[str, Tensor] | None = None
    """Values in the host's memory by the tensor's name, in the base's dtypes; None while they are on the disk alone."""

    @property
    def num_bytes(self) -> int:
        """Of its tensors as they are served, on the host and on the accelerator alike."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def has_sums(self) -> bool:
        """Whether its files carry sums, against which all that is read of it is checked."""
        return bool(self.file.sums)

    def copy_into(self, destination: Callable[[ServedTensor], Rows]) -> None:
        """Copy all values to where they are served from, and check them on the way.

        Where this raises, what was copied by then is to be thrown away. From memory that is pinned, copies may still be
        under way on the current stream.

        Args:
            destination: for each tensor one of the same shape, or one for each index of its first axis; in the base's
                dtype, on any device.

        Raises:
            CorruptDeltaError, DeltaError: as `CheckedReader.read`.
        """
        places = {tensor.name: destination(tensor) for tensor in self.tensors}
        if self.loaded is None:
            self.reader.read(self.file, places)
            return
        for name, rows in places.items():
            values = self.loaded[name]
            is_pinned = values.is_pinned()
            if isinstance(rows, Tensor):
                rows.copy_(values, non_blocking=is_pinned)
            else:
                for row, value in zip(rows, values, strict=True):
                    row.copy_(value, non_blocking=is_pinned)

    def load(self, *, is_pinned: bool = False) -> ServedDelta:
        """The same with its values in the host's memory, checked.

        Args:
            is_pinned: into memory from which an accelerator copies by itself.

        Raises:
            CorruptDeltaError, DeltaError: as `CheckedReader.read`.
        """
        loaded = {x.name: torch.empty(x.shape, dtype=x.dtype, pin_memory=is_pinned) for x in self.tensors}
        self.copy_into(lambda tensor: loaded[tensor.name])
        return replace(self, loaded=loaded)

    def check(self) -> None:
        """Read all of it, and keep nothing.

        Raises:
            CorruptDeltaError, DeltaError: as `CheckedReader.read`.
        """
        self.reader.read(self.file)
