"""Slots for experts of deltas on the accelerator: one expert of one layer a slot, whoever it belongs to.

Deltas come and go in any order and select different numbers of experts in each layer. A slot is as large as one expert
and no larger, so nothing is padded to the widest layer and nothing is left over between two deltas.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from metier.errors import ServingError
from metier.memory.pages import populate
from metier.serving.few_rows import are_small, empty_by_inputs


class RowPool:
    """`num_slots` experts of one shape; thread-safe.

    Attributes:
        tensors: by the base parameter's name, (num_slots, …) in the shape of the base's stacked parameter.
        is_by_inputs: whether experts are small, and their matrices lie input by input (`few_rows.py`).
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        num_slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        is_transposed: bool = False,
    ) -> None:
        """Args:
        shapes: of one expert's parameters, by name.
        num_slots: on a CPU only slots that were written take memory.
        is_transposed: matrices are (inputs, outputs), else (outputs, inputs).
        """
        self.slot_bytes = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
        self.num_slots = num_slots
        self.is_by_inputs = are_small(list(shapes.values()), dtype, torch.device(device))
        self.tensors = {
            name: empty_by_inputs((num_slots, *shape))
            if self.is_by_inputs and len(shape) == 2 and not is_transposed
            else torch.empty(num_slots, *shape, dtype=dtype, device=device)
            for name, shape in shapes.items()
        }
        self._num_written = 0 if torch.device(device).type == "cpu" else num_slots
        """The first slots, whose memory the system has given out; on a CPU it does as they are first written to."""
        # made when first used, as there may be many more slots than are ever taken
        self._matrices: dict[tuple[str, bool, int], Tensor] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_ready(self) -> int:
        """Free slots whose memory is there. They are taken before others."""
        with self._lock:
            return self._num_written - (self.num_slots - len(self._free))

    def make_ready(self, num_bytes: int) -> None:
        """Have the memory there of so many bytes of slots more, one slot at least; any thread may, and others go on.

        A page of memory takes some microseconds when it is first written to, which a delta that comes would wait for.
        """
        with self._lock:
            first = self._num_written
        end = min(self.num_slots, first + max(1, num_bytes // self.slot_bytes))
        for tensor in self.tensors.values():
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            row_bytes = tensor[0].nbytes
            populate(whole[first * row_bytes : end * row_bytes], to_write=True)
        with self._lock:
            self._num_written = max(self._num_written, end)

    def take(self, num: int) -> list[int]:
        """Slots that are nobody's until they are given back.

        Raises:
            ServingError: there are fewer.
        """
        with self._lock:
            if num > len(self._free):
                raise ServingError(
                    f"the pool of delta rows: got {num} experts to place, expected at most {len(self._free)}, as many "
                    f"of its {self.num_slots} slots are free.\nUnload deltas, or give deltas more memory."
                )
            taken = [self._free.pop() for _ in range(num)]
            self._num_written = max([self._num_written, *(slot + 1 for slot in taken)])
            return taken

    def give_back(self, slots: Sequence[int]) -> None:
        """Free slots. No running request may use them any more."""
        with self._lock:
            assert not set(slots) & set(self._free), "a slot is given back once"
            self._free.extend(reversed(slots))

    def matrices(self, name: str, slots: Sequence[int], *, is_transposed: bool) -> list[Tensor]:
        """A weight of each slot as (inputs, outputs), where it lies."""
        found = []
        for slot in slots:
            matrix = self._matrices.get((name, is_transposed, slot))
            if matrix is None:
                weight = self.tensors[name][slot]
                matrix = self._matrices[name, is_transposed, slot] = weight if is_transposed else weight.t()
            found.append(matrix)
        return found

    def write(self, slot: int, name: str, row: Tensor) -> None:
        """Put one parameter of one expert in place, cast to the pool's dtype."""
        self.tensors[name][slot].copy_(row)
