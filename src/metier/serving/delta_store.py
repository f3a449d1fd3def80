"""Where the layers find deltas: each gets a number and slots for its experts, and is wired into the layers it changes.

A delta is placed whole before anybody may use its number, and removed after the last one has used it; so the layers
read without locks while another thread places.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metier.errors import ServingError
from metier.methods.low_rank import LowRankBank
from metier.models.moe import MoELayer
from metier.serving.experts import ON_BASE, ServedExperts
from metier.serving.linears import LinearLora, ServedLinear
from metier.serving.row_pool import RowPool
from metier.serving.served_delta import ServedDelta, ServedTensor
from metier.serving.side_work import SIDE_WORK

_READY_BYTES = 16 << 20
"""Of memory made ready at once: a server that closes waits for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedDelta:
    """A delta on the accelerator."""

    number: int
    """By which a step names it; never that of the base."""
    key: int
    """Of its weights in the cache of prefixes; never 0, which is the base's, and never the same again."""
    experts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """That it changes, by decoder layer."""
    slots: dict[int, list[int]] = field(default_factory=dict)
    """Of its experts, by decoder layer."""


class DeltaStore:
    """Makes the layers of a model ready for deltas, and places them. One thread places and removes."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[MoELayer], *, accelerator_bytes: int, most_deltas: int
    ) -> None:
        """Args:
        model: bare.
        layers: its MoE layers, with their values; none where it is dense.
        accelerator_bytes: that deltas may take, for the number of slots.
        most_deltas: on the accelerator at once.
        """
        self._model = model
        self._free = list(range(most_deltas, 0, -1))
        self._keys = itertools.count(1)
        self._lock = threading.Lock()
        self._most_taken: dict[RowPool, int] = {}
        """Slots of each pool that the largest delta so far took."""
        pools = _pools(layers, accelerator_bytes)
        self._experts: dict[int, ServedExperts] = {}
        self._linears: dict[str, ServedLinear] = {}
        for layer in layers:
            served = ServedExperts(layer, pools[_shapes(layer)], most_deltas)
            self._put(layer.path, served)
            self._experts[layer.index] = served

    @property
    def num_free(self) -> int:
        """Deltas that can be placed beside those that are."""
        return len(self._free)

    def place(self, delta: ServedDelta) -> PlacedDelta:
        """Bring a delta to where the layers find it; nobody may use its number yet.

        Raises:
            ServingError: there are no slots or no number for it.
            CorruptDeltaError, DeltaError: as `ServedDelta.copy_into`; nothing is placed then.
        """
        number = self._take_number(delta)
        slots: dict[int, list[int]] = {}
        try:
            if delta.kind == "esft":
                self._note_size(delta)
                for layer, ids in delta.experts.items():
                    slots[layer] = self._experts[layer].pool.take(len(ids))
                delta.copy_into(lambda tensor: self._rows(tensor, slots))
                placed = PlacedDelta(number=number, key=next(self._keys), experts=delta.experts, slots=slots)
                self._show_slots(delta, placed)
            else:
                values = {x.name: torch.empty(x.shape, dtype=x.dtype, device=self._device(x)) for x in delta.tensors}
                delta.copy_into(lambda tensor: values[tensor.name])
                show = self._show_low_rank if delta.kind == "expert_lora" else self._show_linears
                placed = show(delta, number, values)
            if self._model.device.type == "cuda":
                # the batch runs on a stream of its own, which does not wait for this one's copies
                torch.cuda.current_stream(self._model.device).synchronize()
        except BaseException:
            self._free_again(number, slots)
            raise
        return placed

    def remove(self, placed: PlacedDelta) -> None:
        """Take a delta away. No running request may use its number."""
        self._free_again(placed.number, placed.slots)

    def readying(self) -> Callable[[], None] | None:
        """Work by which memory is there for a delta as large as the largest so far; None once it is."""
        for pool, num in list(self._most_taken.items()):
            if pool.num_ready < min(num, pool.num_free):
                return partial(_make_ready, pool)
        return None

    def _note_size(self, delta: ServedDelta) -> None:
        taken: Counter[RowPool] = Counter()
        for layer, ids in delta.experts.items():
            taken[self._experts[layer].pool] += len(ids)
        for pool, num in taken.items():
            self._most_taken[pool] = max(num, self._most_taken.get(pool, 0))

    def _free_again(self, number: int, slots: dict[int, list[int]]) -> None:
        """Take from all layers what goes by a number."""
        for served in self._experts.values():
            served.slot_NE[number] = ON_BASE
            served.low_rank.pop(number, None)
        for linear in self._linears.values():
            linear.loras.pop(number, None)
        for layer, taken in slots.items():
            self._experts[layer].pool.give_back(taken)
        with self._lock:
            self._free.append(number)

    def _take_number(self, delta: ServedDelta) -> int:
        with self._lock:
            if not self._free:
                raise ServingError(
                    f"{delta.folder}: got one more delta than can be on the accelerator at once. Unload one."
                )
            return self._free.pop()

    def _rows(self, tensor: ServedTensor, slots: dict[int, list[int]]) -> list[Tensor]:
        assert tensor.layer is not None, "an ESFT delta's tensors are of layers"
        stack = self._experts[tensor.layer].pool.tensors[tensor.parameter]
        return [stack[slot] for slot in slots[tensor.layer]]

    def _show_slots(self, delta: ServedDelta, placed: PlacedDelta) -> None:
        for layer, slots in placed.slots.items():
            table_E = self._experts[layer].slot_NE[placed.number]
            table_E[list(delta.experts[layer])] = torch.tensor(slots, dtype=table_E.dtype, device=table_E.device)

    def _show_low_rank(self, delta: ServedDelta, number: int, values: dict[str, Tensor]) -> PlacedDelta:
        for layer, ids in delta.experts.items():
            own = {x.parameter: values[x.name] for x in delta.tensors if x.layer == layer}
            path = next(x.path for x in delta.tensors if x.layer == layer)
            stacks = (own[name] for name in ("up_A", "up_B", "down_A", "down_B"))
            self._experts[layer].low_rank[number] = LowRankBank(ids, delta.scales[path], *stacks)
        return PlacedDelta(number=number, key=next(self._keys), experts=delta.experts)

    def _show_linears(self, delta: ServedDelta, number: int, values: dict[str, Tensor]) -> PlacedDelta:
        for path in dict.fromkeys(x.path for x in delta.tensors):
            own = {x.parameter: values[x.name] for x in delta.tensors if x.path == path}
            (scale,) = delta.scales[path]
            if path not in self._linears:
                self._linears[path] = served = ServedLinear(self._model.get_submodule(path))
                self._put(path, served)
            self._linears[path].loras[number] = LinearLora(own["A"], own["B"].mul_(scale))
        return PlacedDelta(number=number, key=next(self._keys))

    def _device(self, tensor: ServedTensor) -> torch.device:
        if tensor.layer is not None:
            device: torch.device = self._experts[tensor.layer].device
            return device
        weight: Tensor = next(self._model.get_submodule(tensor.path).parameters())
        return weight.device

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(parent), name, module)


def _make_ready(pool: RowPool) -> None:
    with SIDE_WORK.beside(1):
        pool.make_ready(_READY_BYTES)


def _shapes(layer: MoELayer) -> tuple[tuple[str, tuple[int, ...], torch.dtype, torch.device, bool], ...]:
    """What two layers have to agree in for their experts to share a pool."""
    parameters = {name: getattr(layer.experts, name) for name in layer.parameter_names()}
    return tuple((name, tuple(p.shape[1:]), p.dtype, p.device, layer.is_transposed) for name, p in parameters.items())


def _pools(layers: Sequence[MoELayer], accelerator_bytes: int) -> dict[object, RowPool]:
    """A pool for each shape of expert, each large enough for the whole budget, or for the layers' share on a GPU."""
    pools: dict[object, RowPool] = {}
    counts: dict[object, int] = {}
    for layer in layers:
        counts[_shapes(layer)] = counts.get(_shapes(layer), 0) + 1
    for layer in layers:
        key = _shapes(layer)
        if key in pools:
            continue
        shapes = {name: shape for name, shape, *_ in key}
        (_, _, dtype, device, is_transposed), *_ = key
        slot_bytes = RowPool(shapes, 0, dtype=dtype).slot_bytes
        # slots that nobody wrote take no memory on a CPU
        budget = accelerator_bytes if device.type == "cpu" else accelerator_bytes * counts[key] // len(layers)
        num_slots = budget // slot_bytes
        pools[key] = RowPool(shapes, num_slots, dtype=dtype, device=device, is_transposed=is_transposed)
    return pools
