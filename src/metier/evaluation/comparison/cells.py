"""The single runs of a comparison, each in a folder of its own: what is done, what failed, what comes next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metier.evaluation.comparison.config import BASE, Candidate, ComparisonConfig

RESULT, FAILURE, SPEC, LOG = "result.json", "failure.txt", "cell.json", "log.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run: a candidate on a task, at a learning rate, with a seed. The base has neither rate nor seed."""

    task: str
    label: str
    learning_rate: float = 0.0
    seed: int = 0

    @property
    def is_base(self) -> bool:
        return self.label == BASE

    def __str__(self) -> str:
        if self.is_base:
            return f"{self.task}: {self.label}"
        return f"{self.task}: {self.label}, learning rate {self.learning_rate:g}, seed {self.seed}"


class Cells:
    """All that a comparison has run so far.

    A cell's folder is named after all that it depends on, so that a changed setting is a new cell and an old one counts
    no more.
    """

    def __init__(self, config: ComparisonConfig) -> None:
        self.config = config
        self.root = Path(config.output_dir)
        self._candidates = {candidate.label: candidate for candidate in config.candidates}
        self._read: dict[Cell, dict[str, Any]] = {}
        self._folders: dict[Cell, Path] = {}

    def candidate(self, cell: Cell) -> Candidate:
        return self._candidates[cell.label]

    def spec(self, cell: Cell) -> dict[str, Any]:
        """All that the cell's run depends on, as JSON has it."""
        config = self.config.as_dict()
        of_all = ("model", "run", "test_items", "validation_items", "general_bytes", "profile_tokens")
        return {
            "cell": asdict(cell),
            "candidate": None if cell.is_base else asdict(self.candidate(cell)) | {"learning_rate": cell.learning_rate},
            **{name: config[name] for name in of_all},
            # the run's own key does not change what is trained
            "output_dir": None,
        }

    def folder(self, cell: Cell) -> Path:
        if cell not in self._folders:
            self._folders[cell] = self._folder(cell)
        return self._folders[cell]

    def _folder(self, cell: Cell) -> Path:
        digest = hashlib.sha256(json.dumps(self.spec(cell), sort_keys=True, default=str).encode()).hexdigest()[:10]
        name = "".join(letter if letter.isalnum() else "-" for letter in f"{Path(cell.task).name} {cell.label}")
        return self.root / "cells" / f"{name[:60].strip('-')}-{cell.seed}-{digest}"

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What the cell's run found; None where it is not done."""
        if cell not in self._read:
            path = self.folder(cell) / RESULT
            if not path.exists():
                return None
            self._read[cell] = json.loads(path.read_text(encoding="utf-8"))
        return self._read[cell]

    def failure(self, cell: Cell) -> str | None:
        """Why the cell's run ended; None where it did not fail."""
        path = self.folder(cell) / FAILURE
        return path.read_text(encoding="utf-8") if path.exists() else None

    def rates(self, candidate: Candidate) -> list[float]:
        """The learning rates that a candidate may try."""
        return [candidate.learning_rate * factor for factor in self.config.learning_rate_factors]

    def best_rate(self, task: str, candidate: Candidate) -> float | None:
        """The rate with the best validation score, the lowest where several have it; None as long as one is missing."""
        found = {}
        for rate in self.rates(candidate):
            cell = Cell(task=task, label=candidate.label, learning_rate=rate, seed=self.config.seeds[0])
            result = self.result(cell)
            if result is not None:
                found[rate] = result["validation"]
            elif self.failure(cell) is None:
                return None
        return max(sorted(found), key=lambda rate: found[rate]) if found else None

    def known(self) -> Iterator[Cell]:
        """Every cell that is known to be needed, in the order they are run."""
        for task in self.config.tasks:
            yield Cell(task=task, label=BASE)
        for task in self.config.tasks:
            for candidate in self.config.candidates:
                for rate in self.rates(candidate):
                    yield Cell(task=task, label=candidate.label, learning_rate=rate, seed=self.config.seeds[0])
        for task in self.config.tasks:
            for candidate in self.config.candidates:
                best = self.best_rate(task, candidate)
                if best is None:
                    continue
                for seed in self.config.seeds[1:]:
                    yield Cell(task=task, label=candidate.label, learning_rate=best, seed=seed)

    def pending(self) -> list[Cell]:
        """Those of them that are neither done nor failed."""
        return [cell for cell in self.known() if self.result(cell) is None and self.failure(cell) is None]

    def failed(self) -> list[Cell]:
        return [cell for cell in self.known() if self.result(cell) is None and self.failure(cell) is not None]

    def num_needed(self) -> int:
        """Cells of the whole comparison, those too whose learning rate is not known yet."""
        config = self.config
        of_one = len(config.learning_rate_factors) + len(config.seeds) - 1
        return len(config.tasks) * (1 + of_one * len(config.candidates))


def forget_failures(cells: Cells, failed: Sequence[Cell]) -> None:
    """Have cells run again that failed before."""
    for cell in failed:
        (cells.folder(cell) / FAILURE).unlink(missing_ok=True)
