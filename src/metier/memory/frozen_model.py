"""Load a model whose large weights stay frozen in a store: in host memory or on disk, as they are or in fewer bits.

So a model trains that is larger than the memory it is given: its linear layers and experts come to the device that
computes when a product needs them, forward and backward, and go again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from metier.errors import ConfigError
from metier.memory.frozen_store import FrozenLayer, FrozenOrder, FrozenStore, where_stored
from metier.memory.frozen_weight import FrozenWeight, frozen
from metier.memory.row_store import TIERS
from metier.memory.scratch_folder import scratch_folder, warn_if_in_memory
from metier.memory.weight_formats import FORMATS, weight_format
from metier.models.load import LoadedModel, load
from metier.models.weight_by_weight import is_large_weight, large_modules


def load_frozen(
    model: str | Path,
    *,
    store: str = "host",
    weight_format: str | None = None,
    folder: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """As `metier.load`, the linear layers and experts of the decoder's layers in a store, where they cannot be trained.

    They are read one at a time, so that loading takes memory for one. Routers, norms, embeddings and the output layer
    are ordinary parameters.

    Args:
        model: a local folder, a hub id, or "embedded".
        store: where weights live: "device", "host" or "disk".
        weight_format: "int8" (a scale for every row) or "nf4" (4 bits, a scale for every 64 numbers, by
            bitsandbytes); None keeps the numbers as they are.
        folder: where a store on disk puts its files, as many bytes as the weights have, and where weights that have
            to be converted are put while any store is filled; the system's temporary folder by default. Files go with
            the process, whatever ends it.
        dtype, device, revision, trust_remote_code: as `metier.load`.

    Raises:
        ConfigError: an unknown store or format, a format whose library is missing, a folder that cannot be written, or
            `metier.load`'s.
        RowStoreError: the disk has no room.
        UnsupportedModelError: as `metier.load`, or the model has no layers whose weights could go into a store.
        ModelError: as `metier.load`.
    """
    _check(store, weight_format)
    with scratch_folder(folder, option="base_folder") as files:
        if store == "disk":
            warn_if_in_memory(files, "base_folder")
        place = _Stores(store, weight_format, files)
        return load(
            model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code, place=place
        )


def frozen_weights(model: nn.Module) -> list[FrozenWeight]:
    """The weights of a model that live in a store."""
    return [parameter for parameter in model.parameters() if isinstance(parameter, FrozenWeight)]


@dataclass(frozen=True, slots=True)
class StoredSizes:
    """Of a model's weights that `load_frozen` puts into a store."""

    plain_bytes: int
    """As they are loaded."""
    stored_bytes: int
    """In the store."""
    where: str
    """In words."""


def stored_sizes(model: nn.Module, store: str, format_name: str | None) -> StoredSizes:
    """What `load_frozen` would put into a store, counted without loading.

    Args:
        model: bare; its weights may be on the meta device.
        store, format_name: as `load_frozen`.

    Raises:
        ConfigError: as `load_frozen`.
    """
    _check(store, format_name)
    plain, stored = 0, 0
    for weight in large_weights(model):
        num_weights, (rows, columns) = weight[..., 0, 0].numel(), weight.shape[-2:]
        plain += weight.nbytes
        stored += num_weights * weight_format(format_name, (rows, columns), weight.dtype).num_bytes
    return StoredSizes(plain, stored, where_stored(store, format_name))


def large_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those of a bare model that `load_frozen` would put into a store."""
    for path in large_modules(model):
        for name, weight in model.get_submodule(path).named_parameters(recurse=False):
            if is_large_weight(name, weight):
                yield weight


class _Stores:
    """Makes a store of every weight."""

    def __init__(self, tier: str, format_name: str | None, folder: Path) -> None:
        self.tier, self.format_name, self.folder = tier, format_name, folder
        self._order = FrozenOrder()
        self._layers: dict[int, FrozenLayer] = {}

    def put(self, name: str, layer: int, weight: Tensor) -> nn.Parameter:
        if layer not in self._layers:
            self._layers[layer] = FrozenLayer(self._order)
        store = FrozenStore(
            name,
            tuple(weight.shape),
            weight.dtype,
            tier=self.tier,
            format_name=self.format_name,
            folder=self.folder,
            layer=self._layers[layer],
        )
        store.fill(weight)
        return nn.Parameter(frozen(store, weight.device), requires_grad=False)


def _check(store: str, format_name: str | None) -> None:
    if store not in TIERS:
        raise ConfigError(f"store: got {store!r}, expected one of {', '.join(TIERS)}.")
    if format_name is not None and format_name not in FORMATS:
        raise ConfigError(f"weight_format: got {format_name!r}, expected one of {', '.join(FORMATS)}, or none.")
    weight_format(format_name, (1, 1), torch.float32)  # whether its library is there
