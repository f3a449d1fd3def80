"""What is known of this machine's speed: the times of operations that were measured here, kept for the next plan."""

from __future__ import annotations

import hashlib
import json
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


@dataclass
class Machine:
    """Times by name, each measured when it is first asked for.

    Others may use the machine too. So one product, the reference, is timed before and after every measurement; what is
    kept is how many times as long a measurement took, and what the reference usually takes.
    """

    path: Path | None = None
    """None keeps nothing."""
    multiples: dict[str, float] = field(default_factory=dict)
    """Of the reference's time."""
    references: list[float] = field(default_factory=list)
    """Seconds of the reference, the last `_MOST_REFERENCES` times."""
    learned: dict[str, float] = field(default_factory=dict)
    """What former runs on this machine taught (`learning.py`)."""
    is_changed: bool = False
    """Since it was loaded."""

    @classmethod
    def load(cls) -> Machine:
        """This machine, with as many threads as torch has now; without times where nothing readable is kept."""
        path = cache_folder() / f"machine-{fingerprint()}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            multiples, learned = (_numbers(content[name]) for name in ("multiples", "learned"))
            references = [float(seconds) for seconds in content["reference_seconds"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(path)
        return cls(path, multiples, references, learned)

    def seconds(self, name: str, measure: Callable[[], float]) -> float:
        """The time of that name, when the machine is as it usually is."""
        if name not in self.multiples:
            before = reference()
            found = measure()
            after = reference()
            self.multiples[name] = 2 * found / (before + after)
            self.references = [*self.references, before, after][-_MOST_REFERENCES:]
            self.is_changed = True
        return self.multiples[name] * median(self.references)

    def forget_times(self) -> None:
        """Measure everything again."""
        self.multiples, self.references, self.is_changed = {}, [], True

    def save(self) -> bool:
        """Keep what was measured; whether something was. Where nothing can be written, the next plan measures again."""
        if not self.is_changed:
            return False
        self.is_changed = False
        if self.path is None:
            return True
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


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: float(number) for name, number in found.items()}


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
