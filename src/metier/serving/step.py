"""What the layers of a served model have to know of the batch that is running: which token uses which delta.

The engine sets it before a step and clears it after. It belongs to the thread that runs the model, so that a delta can
be tested in another thread meanwhile.
"""

# T tokens of the batch, N numbers of resident deltas

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

NO_DELTA = 0
"""The number of the base itself."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over tokens of several requests, laid end to end."""

    number_T: Tensor
    """The number of each token's delta, int64; `NO_DELTA` for the base."""
    numbers: tuple[int, ...]
    """Those that occur, ascending, the base left out."""
    runs: tuple[tuple[int, int, int], ...]
    """Delta, first token and end of each run of tokens of one delta."""
    kept_runs: tuple[tuple[int, int, int], ...] = ()
    """The same of the tokens that alone reach the output layer; none where all do."""
    counted_T: Tensor | None = None
    """Row of `counts` that a token's experts are counted in, int64, -1 for none; None where nobody counts."""
    counts: dict[int, Tensor] = field(default_factory=dict)
    """By decoder layer, int64, (counted requests, experts); filled by the layers."""
    num_counted: int = 0

    def runs_of(self, num_rows: int) -> tuple[tuple[int, int, int], ...]:
        """The runs as a layer sees them that is given so many rows: all tokens, those that are kept for the output
        layer, or as many rows for each token."""
        num_tokens = len(self.number_T)
        if self.kept_runs and num_rows == self.kept_runs[-1][2] != num_tokens:
            return self.kept_runs
        each = num_rows // num_tokens
        assert each * num_tokens == num_rows, f"got {num_rows} rows, expected a multiple of {num_tokens} tokens"
        return tuple((number, first * each, end * each) for number, first, end in self.runs)


def make_step(
    parts: Sequence[tuple[int, int]],
    *,
    kept: Sequence[int] = (),
    counted: Sequence[int | None] = (),
    device: torch.device | str = "cpu",
) -> Step:
    """A step over requests of `(delta's number, tokens)` each.

    Args:
        kept: the delta's number for each token that reaches the output layer; none where all do.
        counted: for each request the row that its experts are counted in, None for none.
    """
    numbers, sizes = zip(*parts, strict=True)
    sizes_R = torch.tensor(sizes, device=device)
    number_T = torch.tensor(numbers, device=device).repeat_interleave(sizes_R)
    rows = [-1 if row is None else row for row in counted]
    num_counted = max(rows, default=-1) + 1
    return Step(
        number_T=number_T,
        numbers=tuple(sorted(set(numbers) - {NO_DELTA})),
        runs=tuple(_runs(parts)),
        kept_runs=tuple(_runs([(number, 1) for number in kept])),
        counted_T=torch.tensor(rows, device=device).repeat_interleave(sizes_R) if num_counted else None,
        num_counted=num_counted,
    )


def _runs(parts: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    first = 0
    for number, group in groupby(parts, key=lambda part: part[0]):
        end = first + sum(size for _, size in group)
        yield number, first, end
        first = end


_current = threading.local()


def current_step() -> Step | None:
    """The step that this thread is running; None outside of one, when the model is the base."""
    return getattr(_current, "step", None)


@contextmanager
def running(step: Step) -> Iterator[Step]:
    """Run the model for `step` in this thread."""
    former = current_step()
    _current.step = step
    try:
        yield step
    finally:
        _current.step = former
