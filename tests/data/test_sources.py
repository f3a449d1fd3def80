"""Rows come from every kind of source with their origin, and what cannot be read is refused with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metier.data.sources import read_rows
from metier.embedded import task_path
from metier.errors import ConfigError, DataError

ROWS = [{"prompt": "a, “b”\n", "completion": "ä\u2028"}, {"prompt": "c", "completion": "d"}]


def write(path: Path) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)
        case ".csv":
            path.write_text('prompt,completion\r\n"a, “b”\n",ä\u2028\r\nc,d\r\n', encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", [":1", ":2"]),
        ("a.json", [", row 1", ", row 2"]),
        ("a.parquet", [", row 1", ", row 2"]),
        ("a.csv", [":3", ":4"]),
    ],
)
def test_every_file_kind_gives_the_same_rows_with_their_places(tmp_path: Path, name: str, places: list[str]) -> None:
    path = write(tmp_path / name)
    rows = list(read_rows(path))
    assert [row for _, row in rows] == ROWS
    assert [origin for origin, _ in rows] == [f"{path}{place}" for place in places]


def test_jsonl_lines_count_blank_ones_and_end_only_at_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert list(read_rows(path)) == [(f"{path}:1", {"text": "a\u2028b"}), (f"{path}:3", {"text": "c"})]


@pytest.mark.parametrize("text", ['{"text": "a"}\n{"text": "b"}\n', '[{"text": "a"}, {"text": "b"}]'])
def test_json_may_be_a_list_or_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert [row["text"] for _, row in read_rows(tmp_path / "a.json")] == ["a", "b"]


def test_json_may_be_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "text": "a"\n}')
    assert [row["text"] for _, row in read_rows(tmp_path / "a.json")] == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": oops}\n',
            r"a\.jsonl:2: not JSON: .* at column 10\. .*begins: \{\"text\": oops",
        ),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl:1: expected a JSON object with a record's keys, got list"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', r"a\.json:2: not JSON: .* at column 10"),
        (
            "a.json",
            b'[{"text": "a"}, 3]',
            r"a\.json, row 2: expected a JSON object with a record's keys, got int",
        ),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl: is not UTF-8 text .* Convert it, e\.g\. with iconv"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: cannot be read as Parquet"),
        ("a.csv", b"text\na\nb,c\n", r"a\.csv:3: expected 1 columns as in the header"),
        ("a.csv", b"text,b\na\n", r"a\.csv:2: expected 2 columns as in the header"),
        ("a.csv", b'text\n"a\n', r"a\.csv:2: cannot be read as CSV"),
        (
            "a.jsnl",
            b"",
            r"a\.jsnl: unknown extension '\.jsnl', expected one of \.jsonl, .* Did you mean \.jsonl\?",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    expected = f"there is no such file or folder. Did you mean {tmp_path / 'train.jsonl'}?"
    with pytest.raises(DataError, match=re.escape(expected)):
        list(read_rows(tmp_path / "trian.jsonl"))


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.csv", "training.jsonl"):
        write(tmp_path / name)
    assert len(list(read_rows(tmp_path))) == 4
    assert [origin for origin, _ in read_rows(tmp_path, split="test")] == [f"{tmp_path}/test.csv:{n}" for n in (3, 4)]


def test_a_folder_without_the_split_names_its_files(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl")
    with pytest.raises(DataError, match=r"no file of the split 'train', expected e\.g\. train\.jsonl.*: test\.jsonl\."):
        list(read_rows(tmp_path))


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split 'test' was asked for, but a file has no splits"):
        list(read_rows(write(tmp_path / "a.jsonl"), split="test"))


def test_a_saved_dataset_gives_its_split(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in read_rows(tmp_path / "saved", split="test")] == ROWS
    with pytest.raises(DataError, match="no split 'train'; it has test"):
        list(read_rows(tmp_path / "saved"))


@pytest.mark.parametrize("split", [None, "validation"])
def test_an_embedded_task_is_a_source(split: str | None) -> None:
    found = list(read_rows("embedded:synopsis", split=split))
    assert found == list(read_rows(task_path("synopsis", split or "train")))
    with pytest.raises(ConfigError, match="got 'synopsi'"):
        list(read_rows("embedded:synopsi"))


def test_a_dataset_name_is_loaded_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None) -> datasets.DatasetDict:
        asked.append((name, configuration))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert next(read_rows("owner/name:main")) == ("owner/name:main[train], row 1", ROWS[0])
    list(read_rows("name"))
    assert asked == [("owner/name", "main"), ("name", None)]


def test_a_name_that_nothing_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None) -> None:
        raise FileNotFoundError(f"Couldn't find {name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'nothing' is neither a file nor a folder, .* Couldn't find nothing"):
        list(read_rows("nothing"))


def test_what_arrow_fills_in_is_no_part_of_a_call(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]},
            ]
        }
        for given in ({"city": "Paris"}, {"date": "today"})
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "calls.parquet")
    read = [row for _, row in read_rows(tmp_path / "calls.parquet")]
    assert read == rows
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in read_rows(tmp_path / "saved")] == rows
