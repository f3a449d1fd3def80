"""AdamW over some rows of a store: where they lie if those are long pieces, else in chunks that stay in the cache.

torch's fused kernel takes lists of tensors. A row in float32 is such a tensor, together with its neighbours where those
have seen as many steps. Where such pieces are short, a chunk's rows and moments are gathered, updated, and put back:
three reads and three writes of what is touched, whatever else the store holds.

`lazy_update` leaves all other rows at rest, as torch's SparseAdam does, but with a step count for each row. A row that
is never touched neither decays nor moves on by its momentum. `catch_up` makes good for that: it takes the steps that a
row has missed, with a gradient of zero, the learning rates and the decay of their time; then the row is where dense
AdamW would have it.
"""

# R rows of a store, S rows of a chunk, C = 2 * hidden_size numbers a row

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import get_ident

import torch
from torch import Tensor

from metier.memory.row_state import MOMENTS, RowBank, RowState
from metier.memory.stochastic_rounding import round_stochastically

CHUNK_BYTES = 4 << 20
"""Of one array in a chunk: measured best on a CPU whose cores share a cache of some tens of MB."""
DEVICE_CHUNK_BYTES = 32 << 20
"""The same on an accelerator, which has no use for its cache here; not measured."""

IN_PLACE_BYTES = 16 << 10
"""Pieces of so many bytes in the mean are updated in place: less and a list of them costs more than copies."""
_KERNEL_NUMBERS = 16
"""The kernel works on so many numbers at once, and on what is left over by another path, which may round otherwise."""

LEAST_MOMENTUM = 2e-12
"""Missed steps are taken one by one until no more is left of the momentum, which is below what float32 can add to a
weight; further steps only decay, by a product."""


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What one step of AdamW is taken with; the learning rate and the decay may change from step to step."""

    learning_rate: float
    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class StepHistory:
    """What every step so far was taken with, for rows that have missed some of them."""

    def __init__(self, settings: Iterable[StepSettings] = ()) -> None:
        self.settings: list[StepSettings] = []
        self._most_beta1 = 0.0
        self._log_decay = [0.0]
        for past in settings:
            self.append(past)

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def most_missed(self) -> int:
        """How many missed steps have to be taken one by one: 256 where beta1 is 0.9."""
        if not self._most_beta1:
            return 1
        return math.ceil(math.log(LEAST_MOMENTUM) / math.log(self._most_beta1))

    def append(self, settings: StepSettings) -> None:
        self.settings.append(settings)
        self._most_beta1 = max(self._most_beta1, settings.beta1)
        self._log_decay.append(self._log_decay[-1] + math.log1p(-settings.learning_rate * settings.weight_decay))

    def decay_since(self, step: int) -> float:
        """What weight decay alone has left of a weight since it had seen `step` steps."""
        return math.exp(self._log_decay[-1] - self._log_decay[step])


class RowChunks:
    """Rows of a bank and their moments as float32, some at a time, in buffers that are used again."""

    def __init__(self, bank: RowBank, state_dtype: str) -> None:
        self.bank, self.state = bank, RowState(bank, state_dtype)
        columns, on_cpu = 2 * bank.hidden_size, bank.device.type == "cpu"
        self.can_be_in_place = _can_be_in_place(columns, bank.dtype, state_dtype, on_cpu=on_cpu)
        self.num_rows = _rows_of_chunk(columns, on_cpu=on_cpu)

    @property
    def _buffers(self) -> Tensor:
        """Made when they are first asked for: rows that are updated in place need none."""
        num_rows, columns = min(self.num_rows, self.bank.num_rows), 2 * self.bank.hidden_size
        return _buffers(num_rows, columns, self.bank.device, get_ident())

    @property
    def _rows_RC(self) -> Tensor:
        return self.bank.array("rows").flatten(1)

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """All rows, first and second moments as they lie, (R, C) each; of use where they are float32."""
        return self._rows_RC, self.bank.array(MOMENTS[0]), self.bank.array(MOMENTS[1])

    def read(self, row_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, first and second moments, and a place for gradients, (S, C) each."""
        rows_SC, first_SC, second_SC, grads_SC = self._buffers[:, : len(row_ids)]
        if self.bank.dtype == torch.float32:
            torch.index_select(self._rows_RC, 0, row_ids, out=rows_SC)
        else:
            rows_SC.copy_(self._rows_RC.index_select(0, row_ids))
        self.state.read(row_ids, (first_SC, second_SC))
        return rows_SC, first_SC, second_SC, grads_SC

    def write(self, row_ids: Tensor, generator: torch.Generator) -> None:
        """Put back what `read` gave and was changed in place."""
        rows_SC, first_SC, second_SC, _ = self._buffers[:, : len(row_ids)]
        if self.bank.dtype != torch.float32:
            rows_SC = round_stochastically(rows_SC, generator)
        self._rows_RC.index_copy_(0, row_ids, rows_SC)
        self.state.write(row_ids, (first_SC, second_SC), generator)


def _can_be_in_place(columns: int, dtype: torch.dtype, state_dtype: str, *, on_cpu: bool) -> bool:
    """Whether rows of so many numbers could be updated where they lie, to the same bits."""
    return on_cpu and state_dtype == "float32" and dtype == torch.float32 and columns % _KERNEL_NUMBERS == 0


def are_copied(hidden_size: int, dtype: torch.dtype, state_dtype: str, *, share: float, on_cpu: bool) -> bool:
    """Whether rows are gathered and put back where any `share` of them is updated, as likely as any other."""
    if not _can_be_in_place(2 * hidden_size, dtype, state_dtype, on_cpu=on_cpu):
        return True
    # a row's next one is updated too with a chance of `share`
    return 8 * hidden_size < (1 - share) * IN_PLACE_BYTES


def _rows_of_chunk(columns: int, *, on_cpu: bool) -> int:
    return max(1, (CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES) // (4 * columns))


def buffer_bytes(
    num_rows: int, hidden_size: int, dtype: torch.dtype, state_dtype: str, *, is_exact: bool, on_cpu: bool
) -> int:
    """What chunks take at most beside stores of so many rows each, once for all of a process.

    Args:
        num_rows, hidden_size, dtype: of the store with the most rows.
        state_dtype: of the moments.
        is_exact: whether rows catch up, which is done by chunks always.
        on_cpu: where the rows are updated.
    """
    columns = 2 * hidden_size
    if not is_exact and not are_copied(hidden_size, dtype, state_dtype, share=0, on_cpu=on_cpu):
        return 0
    return 4 * min(_rows_of_chunk(columns, on_cpu=on_cpu), num_rows) * columns * 4


@lru_cache(maxsize=4)
def _buffers(num_rows: int, columns: int, device: torch.device, thread: int) -> Tensor:
    """One set for all layers that a thread updates in turn."""
    return torch.empty(4, num_rows, columns, device=device)


@torch.no_grad()
def update_rows(
    chunks: RowChunks, row_ids: Tensor, grads_GC: Tensor, grad_ids: Tensor, settings: StepSettings, seed: int
) -> None:
    """One step of AdamW on those rows: each one's count of steps goes up by one, and the rest of the store rests.

    Args:
        chunks: of the store.
        row_ids: int64 (S,), each once.
        grads_GC: gradients, float32, on the store's device.
        grad_ids: which row of `grads_GC` is whose, (S,).
        settings: of this step.
        seed: of the random rounding, where something is kept in bfloat16; another for each step.
    """
    if not len(row_ids):
        return
    if chunks.can_be_in_place:
        pieces = _Pieces(chunks.state.steps_R, row_ids, grad_ids)
        if 4 * len(row_ids) * grads_GC.shape[1] >= IN_PLACE_BYTES * len(pieces.firsts):
            _update_in_place(chunks, pieces, grads_GC, settings)
            return
    steps_R, generator = chunks.state.steps_R, torch.Generator(chunks.bank.device).manual_seed(seed)
    for ids, places, steps in _sorted_chunks(row_ids, grad_ids, steps_R, chunks.num_rows):
        rows_SC, first_SC, second_SC, grads_SC = chunks.read(ids)
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 == len(places) and len(set(steps)) == 1:
            grads_SC = grads_GC[first : last + 1]  # they lie together in this order: no copy
        else:
            torch.index_select(grads_GC, 0, places, out=grads_SC)
        starts = [0, *(i for i in range(1, len(steps)) if steps[i] != steps[i - 1]), len(steps)]
        parts = [slice(*bounds) for bounds in pairwise(starts)]
        now = [steps[part.start] + 1 for part in parts]
        _fused_adamw([[x[part] for part in parts] for x in (rows_SC, grads_SC, first_SC, second_SC)], now, settings)
        chunks.write(ids, generator)
    steps_R.index_add_(0, row_ids, torch.ones_like(row_ids, dtype=steps_R.dtype))


class _Pieces:
    """Rows that lie side by side, their gradients too, and have seen as many steps."""

    def __init__(self, steps_R: Tensor, row_ids: Tensor, grad_ids: Tensor) -> None:
        self.row_ids, self.grad_ids, self.steps_S = row_ids, grad_ids, steps_R[row_ids]
        is_first_S = torch.ones_like(row_ids, dtype=torch.bool)
        is_first_S[1:] = (row_ids.diff() != 1) | (grad_ids.diff() != 1) | (self.steps_S.diff() != 0)
        self.firsts = is_first_S.nonzero().flatten()

    def places(self) -> list[tuple[int, int, int]]:
        """Of each its first row, that one's gradient, and how many there are."""
        ends = self.firsts.new_tensor([len(self.row_ids)])
        lengths = torch.cat([self.firsts, ends]).diff().tolist()
        rows, grads = self.row_ids[self.firsts].tolist(), self.grad_ids[self.firsts].tolist()
        return list(zip(rows, grads, lengths, strict=True))


def _update_in_place(chunks: RowChunks, pieces: _Pieces, grads_GC: Tensor, settings: StepSettings) -> None:
    """`update_rows` without copies: a piece is one tensor to the kernel."""
    chunks.state.steps_R.index_add_(0, pieces.row_ids, torch.ones_like(pieces.steps_S))
    places, steps = pieces.places(), (pieces.steps_S[pieces.firsts] + 1).tolist()
    mine = [[array[row : row + length] for row, _, length in places] for array in chunks.arrays()]
    grads = [grads_GC[place : place + length] for _, place, length in places]
    _fused_adamw([mine[0], grads, *mine[1:]], steps, settings)


@torch.no_grad()
def catch_up(chunks: RowChunks, row_ids: Tensor, history: StepHistory, seed: int) -> bool:
    """Take the steps that those rows have missed, so that they are where dense AdamW would have them now; whether there
    were any.

    Args:
        chunks: of the store.
        row_ids: int64 (S,), each once.
        history: every step so far; row `r` has seen the first `steps_R[r]` of them.
        seed: as of `update_rows`.
    """
    steps_R, generator = chunks.state.steps_R, torch.Generator(chunks.bank.device).manual_seed(seed)
    row_ids = row_ids[steps_R[row_ids] < len(history)]
    if not len(row_ids):
        return False
    has_moved_S = torch.cat([chunks.state.has_moved(part) for part in row_ids.split(chunks.num_rows)])
    still, moving = row_ids[~has_moved_S], row_ids[has_moved_S]
    for ids, _, steps in _sorted_chunks(still, still, steps_R, chunks.num_rows):
        if history.decay_since(steps[0]) != 1:
            rows_SC, first_SC, second_SC, _ = chunks.read(ids)
            _only_decay(rows_SC, first_SC, second_SC, steps, history)
            chunks.write(ids, generator)
    most_missed = history.most_missed
    for ids, _, steps in _sorted_chunks(moving, moving, steps_R, chunks.num_rows):
        rows_SC, first_SC, second_SC, grads_SC = chunks.read(ids)
        grads_SC.zero_()
        for step in range(steps[0] + 1, len(history) + 1):
            # in the order of their counts, the rows that missed this step and are not left to `_only_decay`
            part = slice(bisect_left(steps, step - most_missed), bisect_left(steps, step))
            if part.start < part.stop:
                lists = [[x[part]] for x in (rows_SC, grads_SC, first_SC, second_SC)]
                _fused_adamw(lists, [step], history.settings[step - 1])
        _only_decay(rows_SC, first_SC, second_SC, [seen + most_missed for seen in steps], history)
        chunks.write(ids, generator)
    steps_R[row_ids] = len(history)
    return True


def _only_decay(
    rows_SC: Tensor, first_SC: Tensor, second_SC: Tensor, steps: Sequence[int], history: StepHistory
) -> None:
    """What is left of the missed steps after those of `steps`, without the momentum's part."""
    num_left = [max(0, len(history) - step) for step in steps]
    if not any(num_left):
        return
    last = history.settings[-1]

    def column(values: list[float]) -> Tensor:
        return rows_SC.new_tensor(values).unsqueeze(1)

    rows_SC.mul_(column([history.decay_since(min(step, len(history))) for step in steps]))
    first_SC.mul_(column([last.beta1**num for num in num_left]))
    second_SC.mul_(column([last.beta2**num for num in num_left]))


def _sorted_chunks(
    row_ids: Tensor, companions: Tensor, steps_R: Tensor, num_rows: int
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Rows in the order of their step counts, `num_rows` at a time, with their companions and counts."""
    steps_S, order = steps_R[row_ids].sort(stable=True)
    ids, places, steps = row_ids[order], companions[order], steps_S.tolist()
    for first in range(0, len(steps), num_rows):
        part = slice(first, first + num_rows)
        yield ids[part], places[part], steps[part]


def _fused_adamw(lists: list[list[Tensor]], steps: Sequence[int], settings: StepSettings) -> None:
    """torch's kernel on lists of rows, gradients, first and second moments; `steps` counts this step too."""
    rows, grads, first, second = lists
    # the kernel only reads the counts, so that one tensor does for all that are equal
    counts = {step: torch.tensor(float(step), device=rows[0].device) for step in set(steps)}
    torch._fused_adamw_(
        rows,
        grads,
        first,
        second,
        [],
        [counts[step] for step in steps],
        lr=settings.learning_rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
    )
