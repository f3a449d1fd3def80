"""What `verify` found: one line a check, and the error for those that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from metier.errors import VerificationError

_MARKS = {"passed": ("✓", "green"), "failed": ("✗", "bold red"), "skipped": ("–", "yellow")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One promise, and whether the delta keeps it."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    sentence: str
    """What was found, or why the check was not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """All checks of one delta on one base; prints itself with rich."""

    delta: str
    base: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check was run and passed."""
        return all(check.status == "passed" for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise a VerificationError that names every check that did not pass."""
        if self.passed:
            return
        failed = [f"- {check.name}: {check.sentence}" for check in self.checks if check.status == "failed"]
        skipped = [check.name for check in self.checks if check.status == "skipped"]
        not_run = f"\nNot run: {'; '.join(skipped)}." if skipped else ""
        raise VerificationError(
            f"{self.delta} on {self.base}: {len(failed)} of {len(self.checks)} checks failed, expected none.\n"
            + "\n".join(failed)
            + f"{not_run}\nDo not serve or merge this delta; load the base that it was trained on, or train it again."
        )

    def __rich__(self) -> Table:
        title = f"{self.delta} on {self.base}: {'verified' if self.passed else 'NOT verified'}"
        table = Table(title=Text(title), title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(style="bold", overflow="fold", ratio=2)
        table.add_column(overflow="fold", ratio=3)
        for check in self.checks:
            mark, style = _MARKS[check.status]
            table.add_row(Text(mark, style=style), Text(check.name), Text(check.sentence))
        return table
