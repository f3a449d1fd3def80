"""What to evaluate on: a task's name, its metrics and where the records of each split are.

A task is embedded in the package, a folder with `task.json` beside its splits, or one plain records file for
which the caller names the metrics. All three become the same `TaskSpec`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metier import embedded
from metier.data.records import Record, load_records
from metier.errors import ConfigError, DataError
from metier.evaluation.metrics import METRICS, check_metric_names

MAX_NEW_TOKENS = 64
_RECORD_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_KEYS = ("name", "metrics", "description", "max_new_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """A task: prompts that end in an assistant's reply, and how replies are scored."""

    name: str
    metrics: tuple[str, ...]
    """Names from `evaluation/metrics.py`; comparisons lead with the first."""
    splits: Mapping[str, Path]
    """The records file of each split."""
    description: str = ""
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        check_metric_names(self.metrics, where=f"task {self.name!r}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"task {self.name!r}: max_new_tokens must be at least 1, got {self.max_new_tokens}.")

    def records(self, split: str, *, limit: int | None = None) -> list[Record]:
        """The records of a split, the first `limit` of them, with the further keys that the metrics need.

        Raises:
            ConfigError: the split is unknown, or `limit` is not positive.
            DataError: the split holds no record, or one that cannot be read.
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"task {self.name!r}: limit must be at least 1, got {limit}.")
        if split not in self.splits:
            hint = _nearest(split, self.splits)
            raise ConfigError(f"task {self.name!r}: unknown split {split!r}.{hint} It has: {', '.join(self.splits)}.")
        keep = {key: None for metric in self.metrics for key in METRICS[metric].record_keys}
        return load_records(self.splits[split], limit=limit, keep=list(keep))


def load_task(task: str | Path, *, metrics: Sequence[str] | None = None) -> TaskSpec:
    """Find a task by its embedded name, its folder or its records file.

    Args:
        task: an embedded task's name; a folder with `task.json` and `<split>.jsonl` (or .json, .parquet,
            .csv) files; or a records file, which becomes the split "test".
        metrics: replaces the task's own metrics; required for a records file.

    Raises:
        ConfigError: nothing of that name, no metrics, an unknown metric, or a `task.json` with unknown keys.
        DataError: `task.json` cannot be read.
    """
    if str(task) in embedded.task_names():
        return _load_folder(embedded.task_path(str(task), "test").parent, metrics)
    path = Path(task)
    if path.is_dir():
        return _load_folder(path, metrics)
    if path.is_file():
        if metrics is None:
            raise ConfigError(
                f"{path}: a records file does not say how replies are scored. Give metrics=[...], "
                "or make it a folder with task.json."
            )
        return TaskSpec(name=path.stem, metrics=tuple(metrics), splits={"test": path})
    names = embedded.task_names()
    raise ConfigError(
        f"unknown task {str(task)!r}: neither an embedded task nor a folder or file."
        f"{_nearest(str(task), names)} Embedded tasks: {', '.join(names)}."
    )


def _load_folder(folder: Path, metrics: Sequence[str] | None) -> TaskSpec:
    path = folder / "task.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). A task folder needs a task.json with name and metrics."
        ) from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: got a JSON {type(values).__name__}, expected an object with name and metrics.")
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}.{_nearest(key, _KEYS)} Known keys: {', '.join(_KEYS)}.")
    own = values.get("metrics", [])
    if not isinstance(own, list) or not all(isinstance(metric, str) for metric in own):
        raise ConfigError(f"{path}: metrics must be a list of names, got {own!r}.")
    length = values.get("max_new_tokens", MAX_NEW_TOKENS)
    if not isinstance(length, int) or isinstance(length, bool):
        raise ConfigError(f"{path}: max_new_tokens must be a whole number, got {length!r}.")
    splits = {
        file.stem: file
        for file in sorted(folder.iterdir())
        if file.suffix in _RECORD_SUFFIXES and file.name != "task.json"
    }
    if not splits:
        raise DataError(f"{folder}: no records beside task.json; expected files such as test.jsonl.")
    return TaskSpec(
        name=str(values.get("name", folder.name)),
        metrics=tuple(own if metrics is None else metrics),
        splits=splits,
        description=str(values.get("description", "")),
        max_new_tokens=length,
    )


def _nearest(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
