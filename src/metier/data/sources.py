"""Where records come from: local files, folders of splits, and any name that `datasets` can load.

Everything becomes an iterator of (origin, row): the row as a plain dict, and where it stands, so that every
later error can say so. What a row means is `formats.py`'s business.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from metier.embedded import task_path
from metier.errors import DataError

Row = dict[str, Any]
DEFAULT_SPLIT = "train"
_EMBEDDED = "embedded:"
_SNIPPET_CHARS = 60


def read_rows(source: str | Path, *, split: str | None = None) -> Iterator[tuple[str, Row]]:
    """Rows of a source, each with its origin ("file.jsonl:12" or "file.parquet, row 12", counted from 1).

    Args:
        source: a .jsonl, .json, .parquet or .csv file; a folder with one or more such files for each split,
            or one that `datasets` saved; `embedded:NAME`, a task that comes along with metier; or the
            name of a data set, `name:configuration` where it has several.
        split: of a folder or a data set; `train` where it is not given. A file has none.

    Raises:
        DataError: nothing is there, its kind is unknown, or it cannot be read.
        ConfigError: no such task comes along.
    """
    if str(source).startswith(_EMBEDDED):
        yield from _read_file(task_path(str(source).removeprefix(_EMBEDDED), split or DEFAULT_SPLIT))
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _read_folder(path, split or DEFAULT_SPLIT)
    elif path.is_file():
        if split is not None:
            raise DataError(f"{path}: split '{split}' was asked for, but a file has no splits. Give that split's file.")
        yield from _read_file(path)
    elif _looks_like_a_path(str(source)):
        raise DataError(f"{path}: there is no such file or folder.{_nearest_file(path)}")
    else:
        yield from _read_dataset(str(source), split or DEFAULT_SPLIT)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """A JSON list of records, one record, or lines of JSON, as many data sets have under this name."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        try:
            rows: list[Any] = [json.loads(text)]
        except json.JSONDecodeError:
            yield from _read_jsonl(path)
            return
    else:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from error
    for number, row in enumerate(rows, start=1):
        origin = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{origin}: expected a JSON object with a record's keys, got {type(row).__name__}.")
        yield origin, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _without_fill(row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(_text(path)), strict=True)
    try:
        for row in reader:
            origin = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{origin}: expected {len(reader.fieldnames or ())} columns as in the header.")
            yield origin, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: cannot be read as CSV: {error}.") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        nearest = difflib.get_close_matches(path.suffix.lower(), _READERS, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise DataError(f"{path}: unknown extension '{path.suffix}', expected one of {', '.join(_READERS)}.{hint}")
    yield from reader(path)


def _read_folder(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        yield from _rows_of_dataset(datasets.load_from_disk(str(folder)), str(folder), split)
        return
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _READERS)
    # data sets on the hub name shards like train-00000-of-00002.parquet
    chosen = [path for path in files if path.stem == split or path.stem.startswith(f"{split}-")]
    if not chosen:
        found = ", ".join(path.name for path in files) or "none"
        raise DataError(
            f"{folder}: no file of the split '{split}', expected e.g. {split}.jsonl; files with records: {found}."
        )
    for path in chosen:
        yield from _read_file(path)


def _read_dataset(source: str, split: str) -> Iterator[tuple[str, Row]]:
    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # `datasets` raises many kinds, and promises none
        raise DataError(f"'{source}' is neither a file nor a folder, and `datasets` cannot load it: {error}") from error
    yield from _rows_of_dataset(loaded, source, split)


def _rows_of_dataset(loaded: Any, source: str, split: str) -> Iterator[tuple[str, Row]]:
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{source}: no split '{split}'; it has {', '.join(loaded)}.")
        loaded = loaded[split]
    for number, row in enumerate(loaded, start=1):
        yield f"{source}[{split}], row {number}", _without_fill(row)


def _without_fill(value: Any) -> Any:
    """Without the None that Arrow puts where other rows have a key, at whatever depth: in a call's arguments too."""
    if isinstance(value, dict):
        return {key: _without_fill(item) for key, item in value.items() if item is not None}
    return [_without_fill(item) for item in value] if isinstance(value, list) else value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}). Convert it, e.g. with iconv.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def _object(line: str, origin: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        snippet = line.strip()[:_SNIPPET_CHARS]
        raise DataError(
            f"{origin}: not JSON: {error.msg} at column {error.colno}. The line begins: {snippet}"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{origin}: expected a JSON object with a record's keys, got {type(row).__name__}.")
    return row


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).suffix.lower() in _READERS or source.count("/") > 1


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [other.name for other in path.parent.iterdir()]
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / nearest[0]}?" if nearest else ""
