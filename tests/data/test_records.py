"""Loading limits and splits, and mixing task records with general ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from metier.data.records import Record, load_records, mix
from metier.errors import DataError


def texts(name: str, count: int) -> list[Record]:
    return [Record(messages=(), origin=f"{name}:{index}", text="x") for index in range(count)]


def test_records_are_loaded_in_order_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{not read}\n')
    assert [record.text for record in load_records(path, limit=2)] == ["a", "b"]
    assert load_records(tmp_path, split="train", limit=1)[0].origin == f"{path}:1"


def test_further_keys_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "tests": ["x"], "id": 3}\n{"text": "b", "id": 4}\n')
    assert [record.extra for record in load_records(path, keep=["tests", "messages"])] == [{"tests": ["x"]}, {}]
    assert [record.extra for record in load_records(path)] == [{}, {}]


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"a\.jsonl: no records\. Expected at least one"):
        load_records(tmp_path / "a.jsonl")


def test_a_limit_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="limit must be at least 1, got 0"):
        load_records(tmp_path / "a.jsonl", limit=0)


@pytest.mark.parametrize(("ratio", "num_general"), [(1.0, 10), (0.5, 5), (2.5, 25)])
def test_mix_holds_each_task_record_once_and_general_ones_in_the_ratio(ratio: float, num_general: int) -> None:
    task, general = texts("task", 10), texts("general", 8)
    mixed = mix(task, general, ratio, seed=0)
    counts = Counter(record.origin for record in mixed)
    assert all(counts[record.origin] == 1 for record in task)
    repeats = [counts[record.origin] for record in general]
    assert sum(repeats) == num_general
    assert max(repeats) - min(repeats) <= 1


def test_mix_is_shuffled_and_repeats_with_its_seed() -> None:
    task, general = texts("task", 20), texts("general", 20)
    first = mix(task, general, 1.0, seed=0)
    assert first == mix(task, general, 1.0, seed=0)
    assert first != mix(task, general, 1.0, seed=1)
    assert len({record.origin.split(":")[0] for record in first[:20]}) == 2


def test_mixing_with_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="cannot mix 3 task records with 0 general ones"):
        mix(texts("task", 3), [], 1.0, seed=0)


def test_a_ratio_of_zero_is_refused() -> None:
    with pytest.raises(DataError, match=r"general_ratio must be greater than 0, got 0\.0"):
        mix(texts("task", 3), texts("general", 3), 0.0, seed=0)
