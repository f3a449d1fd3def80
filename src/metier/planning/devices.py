"""Accelerators by the figures of their makers. Nothing of this was measured: metier was made on a CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from metier.errors import ConfigError

REACHED_RATE, REACHED_BANDWIDTH = 0.6, 0.8
"""Of a maker's figures, what long kernels are taken to reach: an assumption."""
ALLOCATION_BYTES = 512
"""PyTorch's caching allocator gives whole multiples of so many (kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp).
That it asks the driver for 2 MiB and more at a time, and what of that lies idle, is not modelled."""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator."""

    name: str
    memory_bytes: int
    peak_bandwidth: float
    """Of its memory, bytes a second."""
    peak_rates: dict[torch.dtype, float]
    """Of dense matrix products, floating-point operations a second, without sparsity."""
    peak_host_bandwidth: float
    """Of its bus, bytes a second each way."""
    source: str
    launch_seconds: float = 10e-6
    """Of a kernel from PyTorch, what its Python and dispatcher take: an assumption."""

    @property
    def bandwidth(self) -> float:
        """Of its memory, that is reached."""
        return REACHED_BANDWIDTH * self.peak_bandwidth

    @property
    def host_bandwidth(self) -> float:
        """Of its bus, that is reached."""
        return REACHED_BANDWIDTH * self.peak_host_bandwidth

    def rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second that are reached; a dtype without a figure has float32's."""
        return REACHED_RATE * self.peak_rates.get(dtype, self.peak_rates[torch.float32])


def _device(
    name: str, mib: int, bandwidth: float, half: float, fp32: float, bus: float, source: str, *, has_bf16: bool = True
) -> tuple[str, Device]:
    """In MiB as its driver says them, GB and TFLOP a second; `half` is the rate of numbers of 16 bits."""
    rates = {torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: fp32 * 1e12}
    if not has_bf16:
        del rates[torch.bfloat16]
    return name, Device(name, mib << 20, bandwidth * 1e9, rates, bus * 1e9, source)


DEVICES = dict(
    (
        _device("a100-40gb", 40_960, 1555, 312, 19.5, 32, "NVIDIA A100 datasheet"),
        _device("a100-80gb", 81_920, 2039, 312, 19.5, 32, "NVIDIA A100 datasheet, SXM"),
        _device("h100", 81_559, 3350, 989, 67, 64, "NVIDIA H100 datasheet, SXM"),
        _device("h200", 143_771, 4800, 989, 67, 64, "NVIDIA H200 datasheet"),
        _device("l4", 23_034, 300, 121, 30.3, 32, "NVIDIA L4 datasheet"),
        _device("l40s", 46_068, 864, 362, 91.6, 32, "NVIDIA L40S datasheet"),
        _device("a10g", 23_028, 600, 70, 35, 32, "AWS and NVIDIA A10G datasheets"),
        _device("t4", 15_360, 320, 65, 8.1, 16, "NVIDIA T4 datasheet", has_bf16=False),
        _device("rtx-3090", 24_576, 936, 71, 35.6, 32, "NVIDIA Ampere GA102 whitepaper, accumulation in float32"),
        _device("rtx-4090", 24_564, 1008, 165, 82.6, 32, "NVIDIA Ada whitepaper, accumulation in float32"),
        _device("rtx-5090", 32_607, 1792, 209, 104.8, 64, "NVIDIA Blackwell whitepaper, accumulation in float32"),
    )
)


_OTHERS = {"laptop", "pcie", "nvl", "mig", "max", "ti", "super", "d"}
"""Words in the names of devices that are slower, or smaller, than those with these figures."""


def device_of(name: str) -> Device:
    """The accelerator of that name, such as "rtx-4090".

    Raises:
        ConfigError: there is none.
    """
    found = DEVICES.get(name.lower().replace(" ", "-"))
    if found is None:
        raise ConfigError(f"device: got {name!r}, expected one of {', '.join(DEVICES)}.")
    return found


def device_called(full_name: str) -> Device | None:
    """The accelerator that torch calls so, such as "NVIDIA GeForce RTX 4090"; None where it is not known."""
    words = re.split(r"[\s-]+", full_name.lower())
    if any(word in _OTHERS for word in words):
        return None
    fitting = [name for name in DEVICES if all(part in words for part in name.split("-"))]
    return DEVICES[max(fitting, key=len)] if fitting else None
