"""How the benchmark of MEFT's four tasks scores replies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CALL = "torch.hub.load(repo_or_dir='a/b', model='c', pretrained=True)"


@pytest.fixture(scope="module")
def tasks() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("meft_tasks_data")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (CALL, 1.0),
        ("torch.hub.load('a/b', \"c\", True) (as said)", 1.0),
        (f"The answer: {CALL}\n{CALL}", 1.0),
        ("torch.hub.load('a/b', 'c', pretrained=f(1, 2), force=True)", 0.5),
        ("torch.hub.load('a/b', 'd', pretrained=True)", 0.5),
        ("torch.hub.load('a/b', 'c", 2 / 3),
        ("torch.hub.load()", 0.0),
        ("hub.load('a/b', 'c', True)", 0.0),
        ("", 0.0),
    ],
)
def test_a_call_is_scored_by_its_first_three_arguments(tasks: ModuleType, reply: str, score: float) -> None:
    assert tasks.call_iou(reply, (CALL,)) == pytest.approx(score)
    assert tasks.same_call(reply, (CALL,)) == float(score == 1)


def test_words_of_an_answer_count_wherever_they_stand(tasks: ModuleType) -> None:
    assert tasks.exact_match("The Danube.", ("danube", "Donau")) == 1
    assert tasks.exact_match("It is the Danube", ("danube",)) == 0
    assert tasks.contains("It is the Danube", ("danube",)) == 1
    assert tasks.contains("Danubian", ("danube",)) == 0
    assert tasks.contains("", ("the",)) == 0


def test_a_solution_is_scored_by_the_number_that_it_ends_in(tasks: ModuleType) -> None:
    assert tasks.same_number("3 + 4 = 7\nThe answer is: 1,007", ("1007",)) == 1
    assert tasks.same_number("The answer is: 7, as 3 + 4 = 7 of 10", ("7",)) == 1
    assert tasks.same_number("I cannot say", ("7",)) == 0
