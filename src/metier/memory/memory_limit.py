"""How much memory this process may use (the machine's, or what a control group leaves it), and how much it holds."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

_MEMORY = Path("/proc/self/statm")
_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def memory_limit_bytes() -> int:
    """The least of the machine's memory and the limits of the control groups that the process is in."""
    limits = [_physical_bytes(), *_group_limits()]
    return min(limit for limit in limits if limit > 0)


def held_bytes() -> int:
    """What the process holds that is in no file; 0 where nobody can tell."""
    try:
        _, resident, in_files, *_ = map(int, _MEMORY.read_text(encoding="ascii").split())
    except OSError:
        return 0
    return (resident - in_files) * mmap.PAGESIZE


def _physical_bytes() -> int:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 8 << 30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_limits() -> list[int]:
    """Of the process's control group and those that hold it, in both versions of Linux's control groups."""
    try:
        lines = _GROUPS.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            root, name = _ROOT, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _ROOT / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            found += _limit(folder / name)
            if folder == root:
                break
    return found


def _limit(file: Path) -> list[int]:
    try:
        return [int(file.read_text(encoding="ascii"))]
    except (OSError, ValueError):  # no such file, or "max"
        return []
