"""What a comparison is of: a model, tasks, candidates, seeds, and the learning rates that each candidate may try.

Torch-free, as all of this room but the runs themselves: a report of what is there already takes no seconds.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from metier.catalogue.tree import method_of
from metier.config import RunConfig, passed_over
from metier.config_reading import run_config_of
from metier.errors import ConfigError

BASE, FULL = "untouched base", "full fine-tuning"
Experts = Literal["relevant", "random", "coldest"]


_OWN = {"model", "dataset", "output_dir", "seed", "minus_general", "profile_until_stable"}
"""Keys of a run that a comparison sets for all, or that its one profile of a task leaves no room for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One line of a comparison: a method with its settings."""

    label: str
    method: str
    learning_rate: float
    """Its usual one; it may try this one times each of the comparison's factors."""
    experts: Experts = "relevant"
    """Which experts a method on selected ones gets: those that the task uses, as many drawn at random, or as many of
    the least used."""
    run: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other keys of its runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonConfig:
    """One comparison."""

    output_dir: str
    model: str
    tasks: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first one is for the learning rates; the best of them is run with the others."""
    learning_rate_factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    full_learning_rate: float = 3e-5
    """Of full fine-tuning, which is always there."""
    run: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keys of every run, such as max_steps."""
    test_items: int = 200
    """Of a task's test split."""
    validation_items: int = 100
    """Of its validation split, by which learning rates are chosen."""
    general_bytes: int | None = 8_000
    """Of each domain of general text, by which forgetting is measured; all of it where it is null."""
    profile_tokens: int = 65_536
    """Of a task, that are profiled where experts are selected."""

    def __post_init__(self) -> None:
        for name in ("tasks", "candidates", "seeds", "learning_rate_factors"):
            if not getattr(self, name):
                raise ConfigError(f"compare: {name} must name at least one, got none.")
        labels = [candidate.label for candidate in self.candidates]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice or BASE in labels:
            label = (twice or [BASE])[0]
            raise ConfigError(f"compare: the label {label!r} is there twice. Give each candidate its own.")
        if 1.0 not in self.learning_rate_factors:
            raise ConfigError(
                f"compare: learning_rate_factors must have 1, each candidate's own rate, got "
                f"{list(self.learning_rate_factors)}."
            )
        for name in ("test_items", "validation_items", "profile_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"compare: {name} must be a whole number of at least 1, got {value!r}.")
        for candidate in self.candidates:
            taken = _OWN & {*self.run, *candidate.run}
            if taken:
                raise ConfigError(
                    f"compare: {candidate.label}: {', '.join(sorted(taken))} of a run are the comparison's to say. "
                    "Leave them out, or set model, tasks, seeds and profile_tokens of the comparison."
                )
            if candidate.experts != "relevant" and not method_of(candidate.method).selects_experts:
                raise ConfigError(
                    f"compare: {candidate.label}: experts: {candidate.experts} goes with esft and expert_lora, which "
                    f"select experts, and not with {candidate.method}. Leave it out."
                )

    def check_runs(self) -> None:
        """Raise a ConfigError for a key that no run of a candidate can have. Methods are imported for it: seconds."""
        for candidate in self.candidates:
            self.run_config(candidate, self.tasks[0], candidate.learning_rate, self.seeds[0], Path("-"))

    def run_config(self, candidate: Candidate, task: str, learning_rate: float, seed: int, folder: Path) -> RunConfig:
        """One run of a candidate, in `folder`; its data set is the task's name until the run finds it."""
        own = {**dataclasses.asdict(candidate), "learning_rate": learning_rate, "seed": seed}
        values = run_values({**self.run, "model": self.model}, own, task=task, folder=folder)
        return run_config_of(values, where=f"compare: {candidate.label}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def load_comparison(path: str | Path) -> ComparisonConfig:
    """Read a comparison from YAML.

    Raises:
        ConfigError: it cannot be read, a key is unknown (names the nearest), missing or of a wrong type.
    """
    values = read_yaml(path, what="a comparison's file")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level.")
    values["candidates"] = tuple(_candidate(path, number, one) for number, one in enumerate(values.pop("methods", ())))
    known = [item.name for item in dataclasses.fields(ComparisonConfig)]
    check_keys(path, values, [*known, "methods"])
    missing = [name for name in ("output_dir", "model", "tasks") if name not in values]
    if missing:
        raise ConfigError(f"{path}: missing {', '.join(missing)}. Add what is missing.")
    for name, kind in (("tasks", str), ("seeds", int), ("learning_rate_factors", float)):
        if name in values:
            if not isinstance(values[name], list):
                raise ConfigError(f"{path}: {name} must be a list, got {values[name]!r}.")
            values[name] = tuple(_number(f"{path}: {name}", one, kind) for one in values[name])
    if "full_learning_rate" in values:
        values["full_learning_rate"] = _number(f"{path}: full_learning_rate", values["full_learning_rate"], float)
    return with_full(ComparisonConfig(**values))


def run_values(run: Mapping[str, Any], candidate: Mapping[str, Any], *, task: str, folder: Path) -> dict[str, Any]:
    """Keys of a candidate's run: those of every run, then its own.

    Args:
        run: keys of every run, the model among them; those that the candidate's method would pass over are left out.
        candidate: a `Candidate` as a dictionary, with the `seed` of the run.
        task: the data set.
        folder: of the run.
    """
    own = {name: candidate[name] for name in ("method", "learning_rate", "seed")}
    foreign = passed_over(candidate["method"])
    common = {name: value for name, value in run.items() if name not in foreign}
    return {**common, **candidate["run"], **own, "dataset": task, "output_dir": str(folder)}


def with_full(config: ComparisonConfig) -> ComparisonConfig:
    """The comparison with full fine-tuning in it, if it is not there already."""
    if any(candidate.method == "full" for candidate in config.candidates):
        return config
    full = Candidate(label=FULL, method="full", learning_rate=config.full_learning_rate)
    return dataclasses.replace(config, candidates=(full, *config.candidates))


def _candidate(path: str | Path, number: int, values: object) -> Candidate:
    where = f"{path}: methods[{number}]"
    if not isinstance(values, dict) or "method" not in values or "learning_rate" not in values:
        raise ConfigError(f"{where}: got {values!r}, expected `method` and `learning_rate`, and a `label` if wanted.")
    method = method_of(str(values["method"]), where=where)
    experts = values.get("experts", "relevant")
    if experts not in get_args(Experts):
        raise ConfigError(f"{where}: experts must be {' or '.join(get_args(Experts))}, got {experts!r}.")
    own = {"label", "method", "learning_rate", "experts"}
    return Candidate(
        label=str(values.get("label", method.title)),
        method=method.name,
        learning_rate=_number(f"{where}: learning_rate", values["learning_rate"], float),
        experts=experts,
        run={key: value for key, value in values.items() if key not in own},
    )


def _number(where: str, value: object, kind: type) -> Any:
    """The value as `kind`: YAML reads 1e-4 as a text, for one."""
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} must be {kind.__name__}, got {value!r}.") from None


def read_yaml(path: str | Path, *, what: str) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it cannot be read; `what` says which file is wanted.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error}). Give {what}.") from error


def check_keys(path: str | Path, values: Mapping[str, Any], known: list[str]) -> None:
    """Raise a ConfigError for a key that is none of those known; names the nearest."""
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean '{nearest[0]}'?" if nearest else f"The keys are: {', '.join(known)}."
            raise ConfigError(f"{path}: unknown key '{key}'. {hint}")
