"""`code_tests`: pass@1 of code that the model wrote, by the unit tests of its record.

As HumanEval (arXiv:2107.03374) and MBPP (arXiv:2108.07732) do it: the reply's code and the tests run, and an item
counts if nothing is raised. The code runs in `sandbox.py`'s limited process, and only where the caller allowed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metier.errors import DataError
from metier.evaluation.code_block import code_of
from metier.evaluation.item_scores import ItemScores, mean_of_items
from metier.evaluation.sandbox import DEFAULT_LIMITS, Limits, Outcome, run_tests

RECORD_KEYS = ("tests", "test_setup")


def code_tests(
    replies: Sequence[str], extras: Sequence[Mapping[str, Any]], *, limits: Limits = DEFAULT_LIMITS
) -> ItemScores:
    """100 where a reply's code passes all tests of its record, else 0; replies that are no Python are counted.

    The code is the reply's first code fence in Python, or the whole reply; it must be complete, not the rest of a
    function that the prompt began.

    Args:
        replies: what the model wrote.
        extras: of each record: "tests", Python statements or a list of them (MBPP's `test_list`; for HumanEval
            its `test` and a call of `check`), and "test_setup" if something must run before the reply.
        limits: of each reply.

    Raises:
        DataError: a record without tests, or whose tests cannot be run whatever the reply.
        ConfigError: on a system other than Linux.
    """
    outcomes = []
    for position, (reply, extra) in enumerate(zip(replies, extras, strict=True)):
        tests, setup = _text(extra, "tests", position), _text(extra, "test_setup", position, default="")
        try:
            outcomes.append(run_tests(code_of(reply), tests, setup=setup, limits=limits))
        except DataError as error:
            raise DataError(f"test item {position}: {error}") from error
    return mean_of_items(
        [100.0 * (outcome is Outcome.passed) for outcome in outcomes], num_unparsed=outcomes.count(Outcome.unparsed)
    )


def _text(extra: Mapping[str, Any], key: str, position: int, *, default: str | None = None) -> str:
    value = extra.get(key, default)
    lines = value if isinstance(value, list) else [value]
    text = "\n".join(str(line) for line in lines)
    if not all(isinstance(line, str) for line in lines) or (default is None and not text.strip()):
        raise DataError(
            f"test item {position}: '{key}' must be Python statements or a list of them, got {value!r}.\n"
            "code_tests runs the tests of each record; put them beside its messages."
        )
    return text
