"""How long a step's operations take: on this machine by its own times, on an accelerator by its maker's figures."""

from __future__ import annotations

import math
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from metier.config import RunConfig
from metier.planning import operation_times as times
from metier.planning.devices import Device, device_called
from metier.planning.machine import Machine
from metier.planning.segments import StepTrace
from metier.planning.work import Work

OPERATIONS = ("products", "attention", "memory traffic")
PARTS = (*OPERATIONS, "fresh memory", "overhead", "optimizer", "decoding")
"""Of a step's time. Memory traffic is what operations take that compute little; fresh memory what the system takes to
find pages; overhead what Python and torch take, whatever an operation's size."""
IN_A_STEP = 1.04
"""What operations take in a step of a trainer over what they take by themselves, on a CPU."""
SCATTERED = 4.0
"""How much longer memory traffic takes in a step: what is read has left the caches and is often a transposed view, what
is written is new. Both numbers are a fit to the runs of benchmarks/results/planner.md that are not held out."""

_MOST_FLOPS = 1 << 31
"""Of one product or attention that is measured; a larger one is taken to be as fast. With less, products are slower by
a quarter, and attention is by half: its kernel skips what a causal mask hides in blocks of 512 keys."""
_MOST_NUMBERS = 1 << 23
"""Of what it reads or writes."""
_DISK_BANDWIDTH = 2e9
"""Bytes a second where a disk cannot be measured: an assumption."""
_BYTES = tuple(1 << power for power in (12, 16, 20, 23, 26))
"""Of an operation that computes little."""


class Clock(Protocol):
    """Seconds of what a step does."""

    in_a_step: float
    """What the times of `OPERATIONS` are multiplied by."""
    has_host: bool
    """Whether the host's memory is another than the one that is computed in."""

    @property
    def was_busy(self) -> bool:
        """Whether what was measured may be far too long."""
        ...

    def passes(self, trace: StepTrace) -> dict[str, float]:
        """Of a forward and a backward pass, by part."""
        ...

    def optimizer(self, num_numbers: int, num_row_numbers: int, *, copies_rows: bool) -> float:
        """Of clipping and a step of AdamW over parameters, and over rows of a sparse adapter in its stores.

        Args:
            num_numbers: of parameters with a gradient.
            num_row_numbers: of rows that are updated.
            copies_rows: whether those are gathered and put back for it.
        """
        ...

    def decoding(self, weight_format: str, num_numbers: int) -> float:
        """Of reading frozen weights back from a format of fewer bits."""
        ...

    def from_host(self, num_bytes: int) -> float:
        """Of moving bytes between the host and the device."""
        ...

    def from_disk(self, num_bytes: int) -> float:
        """Of moving bytes between the disk and memory."""
        ...

    def save(self) -> bool:
        """Keep what was measured; whether something was."""
        ...


class MachineClock:
    """This machine's CPU. What has not been measured yet is, and takes some hundredths of a second each.

    Args:
        machine: its times.
        folder: on whose disk files would be.
    """

    has_host = False

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder = machine, folder
        self.in_a_step = machine.learned.get("in_a_step", IN_A_STEP)

    def passes(self, trace: StepTrace) -> dict[str, float]:
        """As `Clock`."""
        found = dict.fromkeys(PARTS, 0.0)
        operations = trace.operations()
        for work, number in operations.works.items():
            found[_part(work)] += self.in_a_step * number * self.of(work)
        found["memory traffic"] *= SCATTERED
        found["fresh memory"] = trace.fresh_bytes * self.machine.seconds("fresh byte", times.fresh_byte)
        beside = self.machine.seconds("overhead", partial(times.overhead, self.of))
        found["overhead"] = operations.count * beside
        return found

    def optimizer(self, num_numbers: int, num_row_numbers: int, *, copies_rows: bool) -> float:
        """As `Clock`."""
        dense = num_numbers * self.machine.seconds("adamw number", times.adamw_number)
        if not num_row_numbers:
            return dense
        name = f"row adamw number, {'copied' if copies_rows else 'in place'}"
        return dense + num_row_numbers * self.machine.seconds(name, partial(times.row_adamw_number, copied=copies_rows))

    def decoding(self, weight_format: str, num_numbers: int) -> float:
        """As `Clock`."""
        measure = partial(times.decoded_number, weight_format)
        return num_numbers * self.machine.seconds(f"{weight_format} number", measure)

    def from_host(self, num_bytes: int) -> float:
        """As `Clock`: nothing is moved."""
        return 0.0

    def from_disk(self, num_bytes: int) -> float:
        """As `Clock`."""
        candidates = (self.folder, *self.folder.absolute().parents, Path(tempfile.gettempdir()))
        folder = next(folder for folder in candidates if folder.is_dir() and os.access(folder, os.W_OK))
        try:
            name = f"disk byte {folder.stat().st_dev}"
            return num_bytes * self.machine.seconds(name, partial(times.disk_byte, folder))
        except OSError:  # full, or no disk at all
            return num_bytes / _DISK_BANDWIDTH

    @property
    def was_busy(self) -> bool:
        """As `Clock`."""
        return self.machine.was_busy

    def save(self) -> bool:
        """As `Clock`."""
        return self.machine.save()

    def of(self, work: Work) -> float:
        """Seconds of one operation by itself."""
        if work.kind in _COMPUTED:
            return self._computed(work, _COMPUTED[work.kind])
        return self._moved(work, _MOVED[work.kind])

    def _computed(self, work: Work, measure: Callable[[torch.dtype, Sequence[int]], float]) -> float:
        """By the time of one of much the same shape."""
        if not work.flops:
            return 0.0
        kind = work.kind.removeprefix("grouped ")
        sizes = [_near(size) for size in work.sizes]
        sizes = _part_of_product(sizes) if kind == "product" else _part_of_attention(sizes)
        name = f"{kind} {_name(work.dtype)} {' '.join(map(str, sizes))}"
        seconds = self.machine.seconds(name, partial(measure, work.dtype, sizes))
        return seconds * math.prod(work.sizes) / math.prod(sizes)

    def _moved(self, work: Work, measure: Callable[[torch.dtype, int], float]) -> float:
        """Between the times of a smaller and a larger one; the smallest's is that of a call."""
        dtype = work.dtype if work.dtype in (torch.bfloat16, torch.float16) else torch.float32

        def seconds(size: int) -> float:
            return self.machine.seconds(f"{work.kind} {_name(dtype)} {size}", partial(measure, dtype, size))

        if work.num_bytes <= _BYTES[0]:
            return seconds(_BYTES[0])
        if work.num_bytes >= _BYTES[-1]:
            return seconds(_BYTES[-1]) * work.num_bytes / _BYTES[-1]
        place = bisect_right(_BYTES, work.num_bytes)
        low, high = _BYTES[place - 1], _BYTES[place]
        share = math.log(work.num_bytes / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(seconds(low)) + share * math.log(seconds(high)))


def clock_here(config: RunConfig) -> Clock | None:
    """That of what this process computes on, and of the disk where a run has its weights or rows; None for an
    accelerator without figures."""
    folder = Path(config.output_dir)
    if config.base_store == "disk":
        folder = Path(tempfile.gettempdir() if config.base_folder is None else config.base_folder)
    if not torch.cuda.is_available():
        return MachineClock(Machine.load(), folder)
    device = device_called(torch.cuda.get_device_name())
    return None if device is None else DeviceClock(device)


class DeviceClock:
    """An accelerator, by the figures of its maker; none was measured.

    Args:
        device: the figures.
        disk_bandwidth: of the host it is in, bytes a second.
    """

    in_a_step, has_host, was_busy = 1.0, True, False

    def __init__(self, device: Device, disk_bandwidth: float = _DISK_BANDWIDTH) -> None:
        self.device, self.disk_bandwidth = device, disk_bandwidth

    def passes(self, trace: StepTrace) -> dict[str, float]:
        """As `Clock`."""
        found = dict.fromkeys(PARTS, 0.0)
        operations = trace.operations()
        for work, number in operations.works.items():
            computed = work.flops / self.device.rate(work.dtype)
            found[_part(work)] += number * max(computed, work.num_bytes / self.device.bandwidth)
        launched = sum(number for work, number in operations.works.items() if work.kind != "grouped product")
        found["overhead"] = launched * self.device.launch_seconds
        return found

    def optimizer(self, num_numbers: int, num_row_numbers: int, *, copies_rows: bool) -> float:
        """Gradient, weight and two moments are read, three of them written, in float32."""
        return 28 * (num_numbers + num_row_numbers) / self.device.bandwidth

    def decoding(self, weight_format: str, num_numbers: int) -> float:
        """Codes are read and numbers of two bytes written."""
        return num_numbers * (3 if weight_format == "int8" else 2.5) / self.device.bandwidth

    def from_host(self, num_bytes: int) -> float:
        """As `Clock`."""
        return num_bytes / self.device.host_bandwidth

    def from_disk(self, num_bytes: int) -> float:
        """As `Clock`."""
        return num_bytes / self.disk_bandwidth

    def save(self) -> bool:
        """As `Clock`."""
        return False


_COMPUTED = {
    "product": times.product,
    "grouped product": times.product,
    "attention": times.attention,
    "attention gradient": times.attention_gradient,
    "masked attention": times.masked_attention,
    "masked attention gradient": times.masked_attention_gradient,
}
_MOVED = {
    "copy": times.copy,
    "function": times.function,
    "gather": times.gather,
    "scatter": times.scatter,
    "choose": times.choose,
}


def _part(work: Work) -> str:
    if work.kind in ("product", "grouped product"):
        return "products"
    return "attention" if work.kind in _COMPUTED else "memory traffic"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _part_of_product(sizes: list[int]) -> list[int]:
    """Of a large product one that is as fast: its longest sides halved."""
    while 2 * math.prod(sizes) > _MOST_FLOPS or _largest_operand(sizes) > _MOST_NUMBERS:
        sizes[sizes.index(max(sizes))] //= 2
    return sizes


def _largest_operand(sizes: Sequence[int]) -> int:
    """Numbers of the largest matrix of a product, or of its result."""
    matrices, rows, inner, columns = sizes
    return matrices * max(rows * inner, inner * columns, rows * columns)


def _part_of_attention(sizes: list[int]) -> list[int]:
    """Of a large one fewer heads, and if those are not enough shorter sequences; as many queries to a key as before."""
    heads, queries, keys, width = sizes
    while 2 * heads * queries * keys * width > _MOST_FLOPS and heads > torch.get_num_threads():
        heads //= 2
    while 2 * heads * queries * keys * width > _MOST_FLOPS and min(queries, keys) > 1:
        queries, keys = queries // 2, keys // 2
    return [heads, queries, keys, width]


def _near(size: int) -> int:
    """The nearest of 1, 2, 3, 4, 6, 8, 12 and so on."""
    if size < 2:
        return size
    power = 1 << (size.bit_length() - 1)
    return min((power, 3 * power // 2, 2 * power), key=lambda other: abs(math.log(size / other)))
