"""Tasks are found by embedded name, folder or file, and every way to miss one says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metier import embedded
from metier.errors import ConfigError, DataError
from metier.evaluation.tasks import TaskSpec, load_task


def test_a_folder_gives_name_metrics_and_splits(task_folder: Path) -> None:
    task = load_task(task_folder)
    assert (task.name, task.metrics, task.max_new_tokens) == ("foxes", ("chrf", "exact_match"), 6)
    assert sorted(task.splits) == ["test", "validation"]
    assert len(task.records("test")) == 5
    assert [record.origin for record in task.records("test", limit=2)] == [
        record.origin for record in task.records("test")[:2]
    ]


def test_metrics_given_replace_the_tasks_own(task_folder: Path) -> None:
    assert load_task(task_folder, metrics=["rouge_l"]).metrics == ("rouge_l",)


@pytest.mark.parametrize("name", embedded.task_names())
def test_each_embedded_task_loads(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert sorted(task.splits) == ["test", "train", "validation"]
    assert len(task.records("test", limit=3)) == 3


def test_a_records_file_is_the_test_split(task_folder: Path) -> None:
    task = load_task(task_folder / "validation.jsonl", metrics=["exact_match"])
    assert (task.name, list(task.splits)) == ("validation", ["test"])
    assert len(task.records("test")) == 1


def test_a_records_file_without_metrics_is_refused(task_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"test\.jsonl: a records file does not say how replies are scored"):
        load_task(task_folder / "test.jsonl")


def test_an_unknown_task_names_the_nearest_embedded_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'synopsys'.* Did you mean 'synopsis'\?"):
        load_task("synopsys")


def test_an_unknown_split_names_the_nearest(task_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'foxes': unknown split 'tests'\. Did you mean 'test'\?"):
        load_task(task_folder).records("tests")


def test_an_empty_split_is_refused(task_folder: Path) -> None:
    (task_folder / "validation.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"validation\.jsonl"):
        load_task(task_folder).records("validation")


def test_a_limit_of_none_is_no_limit_and_0_is_refused(task_folder: Path) -> None:
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        load_task(task_folder).records("test", limit=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "metrics": ["chrff"]}, r"task 'x': unknown metric 'chrff'\. Did you mean 'chrf'"),
        ({"name": "x"}, "task 'x': no metric given"),
        ({"name": "x", "metrics": "chrf"}, r"metrics must be a list of names, got 'chrf'"),
        ({"name": "x", "metric": ["chrf"]}, r"task\.json: unknown key 'metric'\. Did you mean 'metrics'\?"),
        ({"name": "x", "metrics": ["chrf"], "max_new_tokens": "9"}, "max_new_tokens must be a whole number"),
        ({"name": "x", "metrics": ["chrf"], "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_a_task_file_with_a_mistake_is_refused(task_folder: Path, values: dict[str, object], message: str) -> None:
    (task_folder / "task.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        load_task(task_folder)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_folder_without_a_readable_task_file_is_refused(task_folder: Path, text: str | None) -> None:
    (task_folder / "task.json").unlink()
    if text is not None:
        (task_folder / "task.json").write_text(text)
    with pytest.raises(DataError, match=r"task\.json: .*name and metrics"):
        load_task(task_folder)


def test_a_folder_without_records_is_refused(task_folder: Path) -> None:
    for path in task_folder.glob("*.jsonl"):
        path.unlink()
    with pytest.raises(DataError, match=r"no records beside task\.json"):
        load_task(task_folder)


def test_a_task_spec_checks_its_metrics() -> None:
    with pytest.raises(ConfigError, match="task 'mine': unknown metric 'bleu'"):
        TaskSpec(name="mine", metrics=("bleu",), splits={})
