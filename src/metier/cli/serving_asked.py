"""What `metier serve` was asked for, wherever it is to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metier.serving.http.settings import HttpSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    model: str
    base_name: str
    """The base's name in requests."""
    deltas: dict[str, Path]
    dtype: str
    options: dict[str, Any]
    """Of `EngineSettings`, what is not as by default."""
    http: HttpSettings
    host: str
    port: int

    @property
    def served(self) -> str:
        """For the line that says that it runs."""
        return f"base {self.base_name}; deltas: {', '.join(self.deltas) or 'none yet'}"


def self_test_line(num_deltas: int, worst_difference: float) -> str:
    return (
        f"Self-test: each delta ({num_deltas}) says what its merged model says; their logits differ by "
        f"{worst_difference:.1e} of the largest at most."
    )
