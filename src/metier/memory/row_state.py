"""AdamW's two moments of a store's rows, in float32, bfloat16 or 8 bits, read and written some rows at a time.

In 8 bits each row's moment has a scale of its own, so that an update touches nothing but its rows. The first moment is
rounded to the nearest of 255 steps. Of the second the square root is stored, and what is not 0 is kept at one step at
least: it stands in a denominator, where a small value that becomes 0 would turn into a huge change.
"""

# R rows of a store, C = 2 * hidden_size numbers a row, S rows that are read or written

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from metier.memory.row_store import RowStore
from metier.memory.stochastic_rounding import round_stochastically

StateDtype = Literal["float32", "bfloat16", "int8"]
STATE_DTYPES: tuple[str, ...] = get_args(StateDtype)
MOMENTS = ("exp_avg", "exp_avg_sq")
_KINDS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}
_MOST = (127.0, 255.0)


class RowBank(Protocol):
    """Rows with arrays beside them, in one place: a store, or what of it is kept on a device."""

    dtype: torch.dtype
    hidden_size: int

    @property
    def num_rows(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def array(self, name: str) -> Tensor: ...


def add_state(store: RowStore, dtype: str) -> list[str]:
    """Give a store the arrays of a state, which begin at zero; returns their names."""
    rows, columns = store.num_rows, 2 * store.hidden_size
    for name, kind in zip(MOMENTS, _KINDS[dtype], strict=True):
        store.add_array(name, (rows, columns), kind)
        if dtype == "int8":
            store.add_array(f"{name}_scale", (rows, 1), torch.float32)
    store.add_array("steps", (rows,), torch.int32)
    return [name for name in store.arrays if name != "rows"]


class RowState:
    """The moments and the step counts of the rows of a bank, whose store has been given them."""

    def __init__(self, bank: RowBank, dtype: str) -> None:
        self.bank, self.dtype = bank, dtype

    @property
    def steps_R(self) -> Tensor:
        """How many steps each row has seen; with exact updates, the step that it has been brought to."""
        return self.bank.array("steps")

    def has_moved(self, row_ids: Tensor) -> Tensor:
        """Which of those rows a gradient has ever reached, (S,) bool."""
        return self.bank.array(MOMENTS[1]).index_select(0, row_ids).ne(0).any(1)

    def read(self, row_ids: Tensor, out: tuple[Tensor, Tensor]) -> None:
        """Both moments of those rows into float32 (S, C) buffers."""
        for name, buffer_SC in zip(MOMENTS, out, strict=True):
            array = self.bank.array(name)
            if self.dtype == "float32":
                torch.index_select(array, 0, row_ids, out=buffer_SC)
                continue
            buffer_SC.copy_(array.index_select(0, row_ids))
            if self.dtype == "int8":
                buffer_SC.mul_(self.bank.array(f"{name}_scale").index_select(0, row_ids))
        if self.dtype == "int8":
            out[1].square_()

    def write(self, row_ids: Tensor, moments: tuple[Tensor, Tensor], generator: torch.Generator) -> None:
        """Put both moments of those rows back; bfloat16 is rounded with numbers of `generator`."""
        for is_second, (name, values_SC) in enumerate(zip(MOMENTS, moments, strict=True)):
            stored_SC = values_SC
            if self.dtype == "bfloat16":
                stored_SC = round_stochastically(values_SC, generator)
            elif self.dtype == "int8":
                root_SC = values_SC.sqrt() if is_second else values_SC
                scale_S1 = root_SC.abs().amax(1, keepdim=True) / _MOST[is_second]
                self.bank.array(f"{name}_scale").index_copy_(0, row_ids, scale_S1)
                codes_SC = root_SC / scale_S1.where(scale_S1 > 0, torch.ones_like(scale_S1))
                codes_SC = codes_SC.round_().clamp_(min=(root_SC > 0).float()) if is_second else codes_SC.round_()
                stored_SC = codes_SC.clamp_(-_MOST[is_second], _MOST[is_second]).to(_KINDS["int8"][is_second])
            self.bank.array(name).index_copy_(0, row_ids, stored_SC)


def state_bytes(store: RowStore, dtype: str) -> int:
    """What a `RowState` of all of a store's rows takes, in bytes: moments, scales and counts of steps."""
    moments = sum(kind.itemsize for kind in _KINDS[dtype]) * store.num_rows * 2 * store.hidden_size
    return moments + store.num_rows * (4 + (8 if dtype == "int8" else 0))
