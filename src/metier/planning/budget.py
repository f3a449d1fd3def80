"""The memory that a run may take: what is given, a device's, or this machine's."""

from __future__ import annotations

import torch

from metier.errors import ConfigError
from metier.memory.memory_limit import held_bytes, memory_limit_bytes
from metier.planning.devices import Device
from metier.planning.fit import Budget
from metier.planning.machine import Machine
from metier.planning.sizes import read_bytes

WORKSPACE_BYTES = 55 << 20
"""What training takes on a CPU beside its tensors, whatever its size: code of kernels, their buffers, what is freed and
not yet given back. The upper quartile of benchmarks/results/planner.md, to the next 5 MiB, runs that are held out or
compute layers again left out: to foresee too little is worse than too much."""


def machine_budget(
    device_memory: str | None = None,
    host_memory: str | None = None,
    wanted: Device | None = None,
    *,
    in_a_node: int = 1,
) -> Budget:
    """The memory that is given, such as "24GiB", or else that of the device that is wanted, or this machine's.

    Args:
        device_memory: of a process's own device.
        host_memory: of a machine.
        wanted: a device.
        in_a_node: processes that share a machine: its host's memory, and where there is no device all that it has.

    Raises:
        ConfigError: a size that is none, or a host beside no device.
    """
    has_device = torch.cuda.is_available()
    if device_memory is not None:
        device = read_bytes(device_memory, "device_memory")
    elif wanted is not None:
        device = wanted.memory_bytes
    elif has_device:
        device = torch.cuda.get_device_properties(0).total_memory
    else:
        device = memory_limit_bytes() // in_a_node
    host = None if host_memory is None else read_bytes(host_memory, "host_memory")
    if host is not None and device_memory is None and wanted is None and not has_device:
        raise ConfigError(
            "host_memory: is beside a device's, and there is none here. Say what it has (--device-memory 24GiB) or "
            "which it is (--device rtx-4090); a CPU's memory is --device-memory alone."
        )
    if host is None and (has_device or wanted is not None):
        host = memory_limit_bytes()
    # on a device the runtime's share is not known here
    host = None if host is None else host // in_a_node
    return Budget(device, host, 0 if host is not None else held_bytes() + workspace_bytes())


def workspace_bytes() -> int:
    """What training on a CPU takes here beside its tensors."""
    return int(Machine.load().learned.get("workspace_bytes", WORKSPACE_BYTES))
