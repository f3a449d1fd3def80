"""Which tasks of lm-evaluation-harness are meant: its own by name, or local YAML files and folders.

The harness knows some fourteen thousand names and takes ten seconds to list them, so they are only listed where a
name is none of the local ones. Two things that it leaves to chance are put right for local tasks: a file that
cannot be read is an error instead of no task, and data files are found beside the YAML that names them, wherever
the command is run.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.errors import ConfigError, DataError
from metier.evaluation.inference import random_state_kept
from metier.models.load import first_line


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessTasks:
    """Tasks that were found; `built` are the harness's own objects with their data."""

    names: tuple[str, ...]
    """As the harness calls them, groups and tags included."""
    built: tuple[Any, ...]
    """Top-level `lm_eval` tasks and groups."""
    tasks: dict[str, Any]
    """Every single task by name, those inside groups too."""
    manager: Any


def check_installed() -> None:
    """Raise ConfigError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "harness: the package lm_eval (EleutherAI's lm-evaluation-harness) is not installed.\n"
            "Install it with: pip install 'metier[harness]'"
        )


def load_harness_tasks(
    tasks: str | Sequence[str], *, include_path: str | Path | Sequence[str | Path] | None = None
) -> HarnessTasks:
    """Find tasks and load their data.

    Args:
        tasks: names of tasks, groups or tags, YAML files, or folders whose tasks are all meant; several as a list or
            in one text with commas.
        include_path: folders with YAML files whose tasks can be named, too; they go before the harness's own.

    A local task may bring Python code (`!function`, `class`), which runs: name only folders that you trust.

    Raises:
        ConfigError: the harness is not installed, an unknown name, a YAML file that is no task, or a folder without
            one.
        DataError: a task's data cannot be loaded, for instance because it is on the hub and this machine is offline.
    """
    check_installed()
    asked = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    if not asked:
        raise ConfigError("harness: no task given. Name one, such as 'hellaswag', or a YAML file.")
    given = [] if include_path is None else [include_path] if isinstance(include_path, str | Path) else include_path
    local = {name: path for folder in given for name, path in _read_folder(Path(folder)).items()}
    folders = [Path(folder).resolve() for folder in given]
    names: list[str] = []
    for name in asked:
        path = Path(name)
        if name in local or not _is_path(path):
            names.append(name)
            continue
        found, chosen = _find(path)
        local |= found
        folders.append((path if path.is_dir() else path.parent).resolve())
        names += [task for task in chosen if task not in names]
    manager = _manager(names, local, folders)
    _check_names(names, manager)
    return _build(names, manager)


def _is_path(path: Path) -> bool:
    """A folder of the name of a task does not count unless it holds tasks."""
    is_written_so = path.suffix == ".yaml" or len(path.parts) > 1
    return is_written_so or (path.is_dir() and any(path.glob("**/*.yaml")))


def _find(path: Path) -> tuple[dict[str, Path], list[str]]:
    """All tasks of a folder, or of the folder that a file lies in, and the names of those that are meant."""
    if not path.exists():
        raise ConfigError(f"harness: {path}: no such file or folder. Give a task's name, a YAML file or a folder.")
    found = _read_folder(path if path.is_dir() else path.parent)
    if path.is_dir():
        return found, list(found)
    chosen = [name for name, source in found.items() if source == path.resolve()]
    if not chosen:
        raise ConfigError(
            f"harness: {path}: got no task, expected a .yaml file with the key 'task' or 'group'.\n"
            "A file that others include is none by itself; name one of those."
        )
    return found, chosen


def _read_folder(folder: Path) -> dict[str, Path]:
    """Names of the tasks and groups in a folder, and the file of each."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise ConfigError(f"harness: {folder}: no such folder. Give one with the YAML files of tasks.")
    found: dict[str, Path] = {}
    for path in sorted(folder.resolve().glob("**/*.yaml")):
        try:
            name = _name_of(load_yaml(path, resolve_func=False))
        except Exception as error:  # PyYAML's and the harness's errors have no common class
            raise ConfigError(f"harness: {path}: cannot be read as a task: {first_line(error)}") from error
        if name in found:
            raise ConfigError(f"harness: {path}: task {name!r} is in {found[name]} already. Rename one of them.")
        if name is not None:
            found[name] = path
    if not found:
        raise ConfigError(
            f"harness: {folder}: got no task, expected YAML files (.yaml) with the key 'task' or 'group'."
        )
    return found


def _name_of(config: dict[str, Any]) -> str | None:
    name = config.get("group", config.get("task"))
    return name if isinstance(name, str) else None


def _manager(names: Sequence[str], local: dict[str, Path], folders: Sequence[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    # a folder inside another one is read with it; twice would be a task that overrides itself
    outer = sorted(str(folder) for folder in set(folders) if not set(folder.parents) & set(folders))
    manager = TaskManager(include_path=outer, include_defaults=False)
    meant = {member for name in names for member in _with_members(name, manager.task_index)}
    if not meant <= manager.task_index.keys():
        manager = TaskManager(include_path=outer, include_defaults=True)
    for name in meant & local.keys():
        _place_data_files(manager.task_index[name], local[name])
    return manager


def _with_members(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """A name and, if it is a group or a tag, the names of all that belongs to it."""
    yield name
    if name not in index:
        return
    listed = (index[name].cfg or {}).get("task")
    members = sorted(index[name].tags) if index[name].kind.name == "TAG" else listed
    for member in members if isinstance(members, list) else []:
        given = member if isinstance(member, str) else member.get("group", member.get("task"))
        if isinstance(given, str):
            yield from _with_members(given, index)


def _place_data_files(entry: Any, path: Path) -> None:
    """Make the data files of a local task absolute where they lie beside its YAML file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    options = load_yaml(path, resolve_func=False).get("dataset_kwargs")
    if not isinstance(options, dict) or "data_files" not in options:
        return
    files = _absolute(options["data_files"], path.parent)
    try:
        config = load_yaml(path, resolve_func=True)
    except Exception as error:  # whatever the code raises that comes with the task
        raise ConfigError(f"harness: {path}: its Python code could not be loaded: {first_line(error)}") from error
    entry.cfg = {**config, "dataset_kwargs": {**options, "data_files": files}}
    entry.yaml_path = None  # or the file would be read again, with the paths as they were


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(names, folder) for split, names in files.items()}
    if isinstance(files, list):
        return [_absolute(name, folder) for name in files]
    beside = folder / str(files)
    return str(beside) if beside.exists() or any(folder.glob(str(files))) else files


def _check_names(names: Sequence[str], manager: Any) -> None:
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"harness: unknown task {name!r}.{hint} It is none of the {len(manager.all_tasks):,} tasks, groups and "
                "tags that are known, nor a file or folder. `lm_eval ls tasks` lists the harness's own."
            )


def _build(names: Sequence[str], manager: Any) -> HarnessTasks:
    tasks: dict[str, Any] = {}
    built: list[Any] = []
    for name in names:
        try:
            with random_state_kept():
                loaded = manager.load([name])
        except Exception as error:  # whatever the task's own code and `datasets` raise
            raise DataError(
                f"harness: task {name!r} could not be loaded: {type(error).__name__}: {first_line(error)}\n"
                "Its data must be reachable, or in the cache where HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set."
            ) from error
        twice = sorted(tasks.keys() & loaded["tasks"].keys())
        if twice:
            raise ConfigError(f"harness: task {twice[0]!r} was named twice, the second time by {name!r}. Name it once.")
        tasks |= loaded["tasks"]
        built += [loaded["groups"][name]] if name in loaded.get("groups", {}) else loaded["tasks"].values()
    return HarnessTasks(names=tuple(names), built=tuple(built), tasks=tasks, manager=manager)
