"""The tasks that ship: size, form, and no source or text in two places."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from metier import embedded
from metier.data.records import load_records
from metier.evaluation.tasks import load_task

TASKS = ("sections", "synopsis", "translate")
LEAST = {"train": 1500, "validation": 200, "test": 300}
METRICS = {
    "sections": ("json_exact_match",),
    "synopsis": ("rouge_l", "exact_match"),
    "translate": ("chrf",),
}
BEGINNINGS = {
    "sections": "Classify this package as JSON:\n\n",
    "synopsis": "Summarize this package in one line:\n\n",
    "translate": "Translate to Slovak: ",
}
MAX_TASK_BYTES = 1_000_000
LONG_ANSWER_CHARS = 30


def rows(task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in embedded.task_path(task, split).read_text(encoding="utf-8").splitlines()]


def origins(task: str, split: str) -> set[str]:
    return {row["origin"] for row in rows(task, split)}


@pytest.mark.parametrize("split", LEAST)
@pytest.mark.parametrize("task", TASKS)
def test_every_split_loads_as_one_question_and_one_answer(task: str, split: str) -> None:
    records = load_records(embedded.task_path(task, split))
    assert len(records) >= LEAST[split]
    for record in records:
        question, answer = record.messages
        assert (question.role, answer.role) == ("user", "assistant")
        assert question.content.startswith(BEGINNINGS[task])
        assert answer.content.strip() == answer.content != ""
        assert "\n" not in answer.content


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_metrics_and_is_small(task: str) -> None:
    spec = load_task(task)
    assert (spec.name, spec.metrics) == (task, METRICS[task])
    assert set(spec.splits) == set(embedded.SPLITS)
    assert sum(path.stat().st_size for path in spec.splits.values()) < MAX_TASK_BYTES


def test_no_source_is_in_two_splits_or_two_tasks() -> None:
    homes = Counter(origin for task in TASKS for split in embedded.SPLITS for origin in origins(task, split))
    assert [origin for origin, count in homes.items() if count > 1] == []
    assert len(homes) > 3000


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_and_no_long_answer_stands_twice(task: str) -> None:
    messages = [[message["content"] for message in row["messages"]] for s in LEAST for row in rows(task, s)]
    prompts = Counter(prompt.lower() for prompt, _ in messages)
    assert prompts.most_common(1)[0][1] == 1
    if task != "sections":
        answers = Counter(answer.lower() for _, answer in messages if len(answer) >= LONG_ANSWER_CHARS)
        assert answers.most_common(1)[0][1] == 1


@pytest.mark.parametrize("split", LEAST)
def test_sections_answers_are_compact_json_and_no_guess_is_good(split: str) -> None:
    answers = [row["messages"][1]["content"] for row in rows("sections", split)]
    for answer in answers:
        values = json.loads(answer)
        assert list(values) == ["section", "role"]
        assert answer == json.dumps(values, separators=(",", ":"))
    assert Counter(answers).most_common(1)[0][1] < 0.12 * len(answers)


def test_every_answer_of_the_sections_test_can_be_learned() -> None:
    known = {row["messages"][1]["content"] for row in rows("sections", "train")}
    unknown = [row for row in rows("sections", "test") if row["messages"][1]["content"] not in known]
    assert len(unknown) <= 3


def test_the_majority_baseline_that_sections_states_is_right() -> None:
    train, test = ([row["messages"][1]["content"] for row in rows("sections", split)] for split in ("train", "test"))
    ((commonest, _),) = Counter(train).most_common(1)
    assert (
        f"commonest answer scores {100 * test.count(commonest) / len(test):.1f}." in load_task("sections").description
    )


def test_a_synopsis_is_not_in_its_text() -> None:
    for split in LEAST:
        for row in rows("synopsis", split):
            question, answer = (message["content"] for message in row["messages"])
            assert answer.lower() not in question.lower()
