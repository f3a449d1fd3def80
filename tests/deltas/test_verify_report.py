"""A report on the console: every check with its mark and sentence, and paths that are no markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from metier.deltas.verify_report import Check, VerifyReport
from metier.errors import VerificationError

GOOD = Check(name="files are intact", status="passed", sentence="All [bold]whole[/bold].")
BAD = Check(name="every selected row moved", status="failed", sentence="1 rows did not.")
SKIPPED = Check(name="merged", status="skipped", sentence="Not run.")


def report(*checks: Check) -> VerifyReport:
    return VerifyReport(delta="runs/[red]a[/red]", base="b", checks=checks)


def printed(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_each_check_is_a_line_with_its_mark() -> None:
    text = printed(report(GOOD, BAD, SKIPPED))
    lines = text.splitlines()
    assert "runs/[red]a[/red] on b: NOT verified" in lines[0]
    for mark, check in (("✓", GOOD), ("✗", BAD), ("–", SKIPPED)):
        assert any(mark in line and check.name in line and check.sentence in line for line in lines)
    assert "NOT" not in printed(report(GOOD))


@pytest.mark.parametrize("other", [BAD, SKIPPED])
def test_a_report_passes_only_if_every_check_was_run_and_passed(other: Check) -> None:
    assert report(GOOD).passed
    report(GOOD).raise_if_failed()
    assert not report(GOOD, other).passed
    with pytest.raises(VerificationError):
        report(GOOD, other).raise_if_failed()


def test_the_error_names_what_failed_and_what_was_not_run() -> None:
    with pytest.raises(VerificationError) as caught:
        report(GOOD, BAD, SKIPPED).raise_if_failed()
    assert str(caught.value) == (
        "runs/[red]a[/red] on b: 1 of 3 checks failed, expected none.\n"
        "- every selected row moved: 1 rows did not.\n"
        "Not run: merged.\n"
        "Do not serve or merge this delta; load the base that it was trained on, or train it again."
    )
