"""How long one operation of a kind and size takes on this machine's CPU: it is done a few times, and the clock read."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.memory.clipping import clip_grad_norm_
from metier.memory.row_adamw import RowAdamW
from metier.memory.row_store import RowStore
from metier.memory.step_gradients import StepGradients
from metier.memory.weight_formats import weight_format
from metier.planning.trace import Tracer
from metier.planning.work import Work

_SECONDS, _LEAST = 0.02, 3
"""An operation is repeated for so long, and so often at least."""
_COLD_BYTES = 64 << 20
"""Of weights that products go through in turn: in a step no cache has the next one."""
_ROW = 256
_NUMBERS = 1 << 22
_FILE_BYTES = 64 << 20


def reference() -> tuple[float, float]:
    """Seconds of a product of a millisecond or two, and the share of its threads' time that they had a core for."""
    left, right = torch.full((256, 512), 0.5), torch.full((512, 1024), 0.5)
    torch.mm(left, right)
    started, worked = time.perf_counter(), time.process_time()
    seconds = _timed(lambda _: torch.mm(left, right), seconds=0.01)
    share = (time.process_time() - worked) / (time.perf_counter() - started) / torch.get_num_threads()
    return seconds, share


def product(dtype: torch.dtype, sizes: Sequence[int]) -> float:
    """Seconds of a product of (matrices, rows, inner, columns)."""
    matrices, rows, inner, columns = sizes
    number = max(1, min(1024, _COLD_BYTES // (matrices * inner * columns * dtype.itemsize)))
    left = torch.full((matrices, rows, inner), 0.5, dtype=dtype)
    rights = torch.full((number, matrices, inner, columns), 0.5, dtype=dtype)
    out = torch.empty(matrices, rows, columns, dtype=dtype)
    if matrices == 1:
        return _timed(lambda turn: torch.mm(left[0], rights[turn % number, 0], out=out[0]))
    return _timed(lambda turn: torch.bmm(left, rights[turn % number], out=out))


def attention(dtype: torch.dtype, sizes: Sequence[int]) -> float:
    """Seconds of causal attention of (heads, queries, keys, head_dim)."""
    return _attention(dtype, sizes, is_causal=True)


def attention_gradient(dtype: torch.dtype, sizes: Sequence[int]) -> float:
    """Seconds of its backward pass."""
    return _attention_gradient(dtype, sizes, is_causal=True)


def masked_attention(dtype: torch.dtype, sizes: Sequence[int]) -> float:
    """Seconds of attention with a mask of numbers that are added, which hides what a causal one does."""
    return _attention(dtype, sizes, attn_mask=_mask(dtype, sizes))


def masked_attention_gradient(dtype: torch.dtype, sizes: Sequence[int]) -> float:
    """Seconds of its backward pass."""
    return _attention_gradient(dtype, sizes, attn_mask=_mask(dtype, sizes))


def _attention(dtype: torch.dtype, sizes: Sequence[int], **hidden: Any) -> float:
    query, key, value = (x.detach() for x in _heads(dtype, sizes))
    return _timed(lambda _: F.scaled_dot_product_attention(query, key, value, **hidden))


def _attention_gradient(dtype: torch.dtype, sizes: Sequence[int], **hidden: Any) -> float:
    query, key, value = _heads(dtype, sizes)
    out = F.scaled_dot_product_attention(query, key, value, **hidden)
    given = torch.ones_like(out)
    return _timed(lambda _: torch.autograd.grad(out, (query, key, value), given, retain_graph=True))


def _mask(dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
    _, queries, keys, _ = sizes
    return torch.full((1, 1, queries, keys), -torch.inf, dtype=dtype).triu_(1 + max(0, keys - queries))


def _heads(dtype: torch.dtype, sizes: Sequence[int]) -> list[Tensor]:
    heads, queries, keys, width = sizes
    lengths = (queries, keys, keys)
    return [torch.full((1, heads, n, width), 0.5, dtype=dtype, requires_grad=True) for n in lengths]


def copy(dtype: torch.dtype, num_bytes: int) -> float:
    """Seconds in which so many bytes are read and written, half of them each, by an operation that computes little."""
    numbers, out = _numbers(dtype, num_bytes)
    return _timed(lambda _: torch.mul(numbers, 2.0, out=out))


def function(dtype: torch.dtype, num_bytes: int) -> float:
    """The same of an exponential."""
    numbers, out = _numbers(dtype, num_bytes)
    return _timed(lambda _: torch.exp(numbers, out=out))


def gather(dtype: torch.dtype, num_bytes: int) -> float:
    """The same of rows by number."""
    rows_RW, order_R = _rows(dtype, num_bytes // 2)
    out_RW = torch.empty_like(rows_RW)
    return _timed(lambda _: torch.index_select(rows_RW, 0, order_R, out=out_RW))


def scatter(dtype: torch.dtype, num_bytes: int) -> float:
    """Seconds in which rows are added to others by number, a third of the bytes being the rows'."""
    rows_RW, order_R = _rows(dtype, num_bytes // 3)
    sums_RW = torch.zeros_like(rows_RW)
    return _timed(lambda _: sums_RW.index_add_(0, order_R, rows_RW))


def choose(_: torch.dtype, num_bytes: int) -> float:
    """Seconds in which so many bytes of integers are sorted."""
    numbers = torch.randint(64, (max(1, num_bytes // 8),))
    return _timed(lambda _: torch.sort(numbers))


def _numbers(dtype: torch.dtype, num_bytes: int) -> tuple[Tensor, Tensor]:
    numbers = torch.ones(num_bytes // 2 // dtype.itemsize, dtype=dtype)
    return numbers, torch.empty_like(numbers)


def _rows(dtype: torch.dtype, num_bytes: int) -> tuple[Tensor, Tensor]:
    number = max(1, num_bytes // dtype.itemsize // _ROW)
    return torch.ones(number, _ROW, dtype=dtype), torch.randperm(number)


def fresh_byte() -> float:
    """Seconds more that it takes to write a byte of a page that the process did not have before."""
    numbers = torch.empty(_COLD_BYTES // 4)
    warm = _timed(lambda _: numbers.fill_(1.0))
    return max(0.0, _timed(lambda _: torch.empty(_COLD_BYTES // 4).fill_(1.0)) - warm) / _COLD_BYTES


def adamw_number() -> float:
    """Seconds in which a trained number's gradient is clipped and its step taken."""
    parameters = [torch.nn.Parameter(torch.zeros(_NUMBERS // 4)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step(_: int) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return _timed(step) / _NUMBERS


def row_adamw_number(*, copied: bool) -> float:
    """The same of a number in a store whose rows all fire, which are one piece, or every second, which are copied."""
    store = RowStore(_NUMBERS // 64 // 1024, 64, 512)
    gradients = StepGradients(store)
    places, fired, _ = gradients.places(range(store.num_blocks), torch.device("cpu"))
    for place, rows in zip(places, fired, strict=True):
        place.fill_(1.0)
        rows[:: 2 if copied else 1] = True
    optimizer = RowAdamW([gradients.holder])

    def step(_: int) -> None:
        clip_grad_norm_([gradients.holder], 1.0)
        optimizer.step()

    return _timed(step) / (_NUMBERS // 2 if copied else _NUMBERS)


def decoded_number(name: str) -> float:
    """Seconds in which a number of a frozen weight is read back from a format of fewer bits."""
    weight = weight_format(name, (1024, 1024), torch.float32)
    place_NB = torch.zeros(1, weight.num_bytes, dtype=torch.uint8)
    weight.encode(torch.ones(1024, 1024), place_NB[0])
    return _timed(lambda _: weight.decode(place_NB)) / 1024**2


def disk_byte(folder: Path) -> float:
    """Seconds in which a byte of a file is read in order, past the system's cache.

    Raises:
        OSError: the folder cannot be written to.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(1 << 20) * (_FILE_BYTES >> 20))
        file.flush()
        os.fsync(file.fileno())
        found = []
        for _ in range(_LEAST):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            for first in range(0, _FILE_BYTES, 1 << 22):
                os.pread(file.fileno(), 1 << 22, first)
            found.append(time.perf_counter() - started)
    return median(found) / _FILE_BYTES


def overhead(seconds_of: Callable[[Work], float]) -> float:
    """Seconds of an operation beside what it computes: Python, torch's dispatcher and autograd.

    Args:
        seconds_of: what operations take by themselves.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model, ids_BT = LlamaForCausalLM(config), torch.ones(1, 8, dtype=torch.long)

    def step(_: int) -> None:
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()

    tracer = Tracer(None)
    with tracer:
        step(0)
    works = tracer.operations.works
    by_themselves = sum(number * seconds_of(work) for work, number in works.items())
    return max(0.0, _timed(step) - by_themselves) / works.total()


def _timed(once: Callable[[int], object], *, seconds: float = _SECONDS) -> float:
    """Seconds of one of several; the first, in which memory is found and kernels are made, left out."""
    once(0)
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < _LEAST or time.perf_counter() < until:
        started = time.perf_counter()
        once(len(found) + 1)
        found.append(time.perf_counter() - started)
    return median(found)
