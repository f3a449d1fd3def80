"""What is known of this machine's speed: the times of operations that were measured here, kept for the next plan."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from metier.planning.operation_times import reference

FOLDER = "METIER_CACHE"
"""The environment's variable that says where such files are."""
_MOST_REFERENCES = 401
_QUIET = 0.7
"""Share of a core that each thread has at least where nobody else is at work."""


@dataclass
class Machine:
    """Times by name, each measured when it is first asked for.

    Others may use the machine too. So one product, the reference, is timed before and after every measurement; what is
    kept is how many times as long a measurement took, and what the reference usually takes. What is measured while
    others take the cores is for this process alone: threads that wait for each other may take a hundred times as long.
    """

    path: Path | None = None
    """None keeps nothing."""
    multiples: dict[str, float] = field(default_factory=dict)
    """Of the reference's time."""
    references: list[float] = field(default_factory=list)
    """Seconds of the reference, the last `_MOST_REFERENCES` times."""
    learned: dict[str, float] = field(default_factory=dict)
    """What former runs on this machine taught (`learning.py`)."""
    passing: dict[str, float] = field(default_factory=dict)
    """Of `multiples`, those that were measured on a busy machine."""
    passing_references: list[float] = field(default_factory=list)
    is_changed: bool = False
    """Since it was loaded."""
    has_learned: bool = False
    """Since it was loaded."""
    _has_forgotten: bool = False

    @property
    def was_busy(self) -> bool:
        """Whether others had the cores while this process measured something."""
        return bool(self.passing)

    @classmethod
    def load(cls) -> Machine:
        """This machine, with as many threads as torch has now; without times where nothing readable is kept."""
        path = cache_folder() / f"machine-{fingerprint()}.json"
        return cls(path, *_read(path))

    def seconds(self, name: str, measure: Callable[[], float]) -> float:
        """The time of that name, when the machine is as it usually is."""
        if name not in self.multiples and name not in self.passing:
            (before, share), found, (after, share_after) = reference(), measure(), reference()
            multiple = 2 * found / (before + after)
            if min(share, share_after) < _QUIET:
                self.passing[name] = multiple
                self.passing_references += [before, after]
            else:
                self.multiples[name] = multiple
                self.references = [*self.references, before, after][-_MOST_REFERENCES:]
            self.is_changed = True
        multiple = self.multiples[name] if name in self.multiples else self.passing[name]
        return multiple * median(self.references or self.passing_references)

    def forget(self) -> None:
        """Measure everything again, and learn it again."""
        self.multiples, self.references, self.learned = {}, [], {}
        self.is_changed = self._has_forgotten = True
        self.passing, self.passing_references = {}, []

    def save(self) -> bool:
        """Keep what was measured; whether something was. Where nothing can be written, the next plan measures again."""
        if not self.is_changed:
            return False
        self.is_changed = False
        if self.path is None:
            return True
        if not self._has_forgotten:
            # others may have measured and learned meanwhile
            multiples, references, learned = _read(self.path)
            self.multiples = {**multiples, **self.multiples}
            self.references = self.references or references
            self.learned = self.learned if self.has_learned else learned
        content = {
            "machine": facts(),
            "reference_seconds": self.references,
            "multiples": dict(sorted(self.multiples.items())),
            "learned": self.learned,
        }
        partial = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
        return True


def cache_folder() -> Path:
    """`$METIER_CACHE`, or metier's folder among the user's caches."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metier"


def facts() -> dict[str, str]:
    """What a time depends on beside the operation."""
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        # glibc's, which say whether memory is given back
        "allocator": " ".join(sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("MALLOC_"))),
    }


def _read(path: Path) -> tuple[dict[str, float], list[float], dict[str, float]]:
    """Multiples, references and what was learned; nothing where the file is not there, or not as it was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        multiples, learned = (_numbers(content[name]) for name in ("multiples", "learned"))
        references = list(_numbers(dict(enumerate(content["reference_seconds"]))).values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, [], {}
    return (multiples, references, learned) if references else ({}, [], learned)


def _numbers(found: dict[Any, Any]) -> dict[Any, float]:
    numbers = {name: float(number) for name, number in found.items()}
    if not all(math.isfinite(number) and number >= 0 for number in numbers.values()):
        raise ValueError
    return numbers


def fingerprint() -> str:
    """Of this machine, as far as times depend on it."""
    return hashlib.sha256(json.dumps(facts(), sort_keys=True).encode()).hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return names[0] if names else platform.machine()
