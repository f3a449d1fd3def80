"""A small search over methods and the places they go on: what fits the memory runs briefly, the better half runs on.

In the spirit of S4 (arXiv:2301.01821) and AutoPEFT (arXiv:2301.12132), whose spaces are groups of layers and sizes of
several methods at once: here a candidate is one method of the catalogue with its options, places and learning rate. The
planner says before anything runs which candidates fit; successive halving (arXiv:1502.07943) spends the steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from metier.catalogue.method import ALL_PARTS
from metier.catalogue.tree import method_of
from metier.config import RunConfig
from metier.errors import ConfigError
from metier.evaluation.comparison.cells import Cell, Cells
from metier.evaluation.comparison.config import Candidate, ComparisonConfig, check_keys, read_yaml
from metier.evaluation.comparison.schedule import Place, run_cells
from metier.evaluation.tasks import load_task

Fits = Callable[[RunConfig], str]
"""Why a run does not fit; "" where it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """One search."""

    output_dir: str
    model: str
    task: str
    methods: tuple[Mapping[str, Any], ...]
    """Keys of runs, each with `method` and `learning_rates`; a list of values under another key is tried value by value
    if the key stands under `try`."""
    places: tuple[str, ...] = ()
    """Values of `targets` that are tried for the methods that can go there; () leaves each method its usual parts."""
    memory: str | None = None
    """What a run may take, such as 8GiB; this machine's if not given."""
    rungs: tuple[int, ...] = (20, 60, 180)
    """Steps of the rounds; learning rates fall to 0 over each."""
    keep: float = 0.5
    """Share of the candidates that goes on from round to round, in (0, 1)."""
    seed: int = 0
    run: Mapping[str, Any] = field(default_factory=dict)
    """Keys of every run."""
    validation_items: int = 100
    """By whose score candidates are ranked."""

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ConfigError(f"search: keep must be in (0, 1), got {self.keep}.")
        if isinstance(self.places, str) or any(not isinstance(place, str) for place in self.places):
            raise ConfigError(f"search: places must be a list of texts, got {self.places!r}.")
        for place in self.places:
            if unknown := [part for part in _parts(place) if part not in ALL_PARTS]:
                raise ConfigError(
                    f"search: places: got {unknown[0]!r}, expected some of {', '.join(ALL_PARTS)}, with commas."
                )
        if not self.methods or not self.rungs or list(self.rungs) != sorted(set(self.rungs)):
            raise ConfigError(f"search: needs methods, and rungs that rise, got {list(self.rungs)}.")

    def candidates(self) -> list[Candidate]:
        """Every method at every place that it can go, with each of its options and learning rates."""
        found = []
        for number, values in enumerate(self.methods):
            if "method" not in values or not isinstance(values.get("learning_rates"), list):
                raise ConfigError(f"search: methods[{number}]: expected `method` and a list of `learning_rates`.")
            method = method_of(str(values["method"]), where=f"search: methods[{number}]")
            able = [place for place in self.places if set(_parts(place)) <= set(method.can_target)]
            has_places = bool(method.targets or "routed" in method.can_target)
            tried = {"learning_rate": values["learning_rates"], **dict(values.get("try", {}))}
            if has_places and able:
                tried["targets"] = able
            fixed = {key: value for key, value in values.items() if key not in ("method", "learning_rates", "try")}
            for chosen in _combinations(tried):
                rate = float(chosen.pop("learning_rate"))
                said = ", ".join(f"{key} {value}" for key, value in chosen.items())
                label = f"{method.name}{f' ({said})' if said else ''} at {rate:g}"
                found.append(Candidate(label=label, method=method.name, learning_rate=rate, run={**fixed, **chosen}))
        return found

    def round(self, candidates: Sequence[Candidate], num_steps: int) -> ComparisonConfig:
        """One round of the search, as a comparison of one seed and one rate."""
        return ComparisonConfig(
            output_dir=self.output_dir,
            model=self.model,
            tasks=(self.task,),
            candidates=tuple(candidates),
            seeds=(self.seed,),
            learning_rate_factors=(1.0,),
            run={**self.run, "max_steps": num_steps},
            test_items=self.validation_items,
            validation_items=self.validation_items,
            general_bytes=2_000,
        )


def _parts(place: str) -> list[str]:
    return [part.strip() for part in place.split(",")]


def load_search(path: str | Path) -> SearchConfig:
    """Read a search from YAML.

    Raises:
        ConfigError: it cannot be read, or a key is unknown or missing.
    """
    values = read_yaml(path, what="a search's file")
    known = [item.name for item in dataclasses.fields(SearchConfig)]
    needed = ("output_dir", "model", "task", "methods")
    if not isinstance(values, dict) or any(name not in values for name in needed):
        raise ConfigError(f"{path}: expected keys {', '.join(needed)}, and perhaps {', '.join(known[4:])}.")
    check_keys(path, values, known)
    for name in ("methods", "places", "rungs"):
        if name in values:
            if not isinstance(values[name], list):
                raise ConfigError(f"{path}: {name} must be a list, got {values[name]!r}.")
            values[name] = tuple(values[name])
    return SearchConfig(**values)


def search(config: SearchConfig, fits: Fits, place: Place, *, console: Console) -> Path:
    """Run the rounds; `search.json` has all of them, `best.yaml` is the run to repeat at full length.

    Args:
        config: the search.
        fits: of the planner.
        place: where runs go.
        console: where the rounds are told.

    Returns:
        `best.yaml`.

    Raises:
        ConfigError: nothing fits, or every run failed.
    """
    root = Path(config.output_dir)
    left_out, alive = {}, list[Candidate]()
    whole = config.round(config.candidates(), config.rungs[0])
    for candidate in whole.candidates:
        run = whole.run_config(candidate, config.task, candidate.learning_rate, config.seed, root)
        reason = fits(run)
        if reason:
            left_out[candidate.label] = reason
        else:
            alive.append(candidate)
    console.print(f"{len(alive)} of {len(whole.candidates)} candidates fit the memory.", highlight=False)
    rounds = []
    for number, num_steps in enumerate(config.rungs):
        cells = Cells(config.round(_need(alive, left_out), num_steps))
        run_cells(cells, place, console=console)
        ranked = _ranked(cells, config)
        rounds.append({"steps": num_steps, "ranked": [[one.candidate.label, *one.as_list()] for one in ranked]})
        is_last = number == len(config.rungs) - 1
        kept = 1 if is_last else math.ceil(config.keep * len(ranked))
        alive = [one.candidate for one in ranked[:kept]]
        console.print(f"After {num_steps} steps: {', '.join(one.label for one in alive) or 'none'}", highlight=False)
    best = _need(alive, left_out)[0]
    root.mkdir(parents=True, exist_ok=True)
    content = {"config": dataclasses.asdict(config), "rounds": rounds, "left_out": left_out, "best": best.label}
    (root / "search.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    whole_run = dataclasses.replace(config.round([best], config.rungs[-1]), run=dict(config.run))
    records = str(load_task(config.task).splits["train"])
    run = whole_run.run_config(best, records, best.learning_rate, config.seed, root / "best")
    (root / "best.yaml").write_text(run.to_yaml(), encoding="utf-8")
    return root / "best.yaml"


def _need(alive: list[Candidate], left_out: Mapping[str, str]) -> list[Candidate]:
    if not alive:
        why = next(iter(left_out.values()), "every run failed; see the logs in the search's folder")
        raise ConfigError(f"search: no candidate is left: {why}. Give more memory or other candidates.")
    return alive


@dataclass(frozen=True, slots=True)
class _Ranked:
    """A candidate after a round."""

    candidate: Candidate
    score: float
    """On validation."""
    foreseen_bytes: float | None
    """Of its peak, by the planner; None where it cannot say."""
    foreseen_seconds: float | None
    """Of a step."""

    def as_list(self) -> list[float | None]:
        """For JSON."""
        return [self.score, self.foreseen_bytes, self.foreseen_seconds]

    @property
    def order(self) -> tuple[float, float, float]:
        """The best first; of equal scores what takes less."""
        num_bytes, seconds = (
            math.inf if cost is None else cost for cost in (self.foreseen_bytes, self.foreseen_seconds)
        )
        return -self.score, num_bytes, seconds


def _ranked(cells: Cells, config: SearchConfig) -> list[_Ranked]:
    """Candidates, best first; those that failed are out."""
    found = []
    for candidate in cells.config.candidates:
        cell = Cell(task=config.task, label=candidate.label, learning_rate=candidate.learning_rate, seed=config.seed)
        result = cells.result(cell)
        if result is not None:
            costs = (result.get("foreseen_peak_bytes"), result.get("foreseen_step_seconds"))
            found.append(_Ranked(candidate, float(result["validation"]), *costs))
    return sorted(found, key=lambda one: one.order)


def _combinations(tried: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    if not tried:
        yield {}
        return
    name, *others = tried
    for value in tried[name]:
        for rest in _combinations({other: tried[other] for other in others}):
            yield {name: value, **rest}
