"""A Ray cluster as the place where a comparison's cells run: each is a task that asks for what the planner foresees.

All that is known is handed to Ray at once; which cell runs where and when, and what is run again when a node is lost,
is Ray's to say. What comes back is written here, into the folders that runs on one machine have.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metier.config import RunConfig
from metier.embedded import task_names
from metier.evaluation.comparison import child
from metier.evaluation.comparison.cells import LOG, Cell, Cells
from metier.evaluation.comparison.config import ComparisonConfig
from metier.evaluation.comparison.on_ray.cluster import LOST_RETRIES, check_nodes, in_a_line, nodes_of, ray_cluster
from metier.evaluation.comparison.on_ray.files import add_folders, read_files, write_files
from metier.evaluation.comparison.on_ray.needs import Needs, share_of_node
from metier.evaluation.comparison.on_ray.on_node import Order, Outcome, carry_out
from metier.evaluation.comparison.schedule import End

Foresee = Callable[[RunConfig, bool], int | None]
"""Of a run, and whether an accelerator computes it: bytes of its host's memory; None where that cannot be said."""

_LOOK_SECONDS, _CANCEL_SECONDS = 10.0, 5.0
_READ_KEYS = ("eval_dataset", "general_dataset", "selection")
"""Of a run, that may name a path."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A cell that Ray has."""

    cells: Cells
    cell: Cell
    needs: Needs


@contextmanager
def ray_place(
    config: ComparisonConfig, foresee: Foresee, *, address: str | None = None, num_jobs: int = 1
) -> Iterator[RayPlace]:
    """A cluster that has all that the comparison's cells need.

    Args:
        config: the comparison.
        foresee: of the planner.
        address: of the cluster, as `ray_cluster` takes it.
        num_jobs: cells at once on a node; each gets its share of the cores, as on one machine.

    Raises:
        ConfigError, RunError: as `ray_cluster`, `share_of_node` and `check_nodes`.
    """
    inputs = inputs_of(config)
    with ray_cluster(address) as ray:
        nodes = nodes_of(ray)
        share = share_of_node(nodes, num_jobs)
        check_nodes(ray, nodes, inputs)
        yield RayPlace(ray, foresee, share, inputs)


class RayPlace:
    """A `Place`.

    Args:
        ray: the module, connected.
        foresee: of the planner.
        share: what a cell gets of which the planner can say nothing.
        inputs: paths that runs read.
    """

    def __init__(self, ray: Any, foresee: Foresee, share: Needs, inputs: tuple[str, ...]) -> None:
        self._ray, self._foresee, self._share, self._inputs = ray, foresee, share, inputs
        self._task = ray.remote(carry_out)
        self._nodes, self._looked = nodes_of(ray), time.monotonic()
        self._sent: dict[Any, _Sent] = {}
        """By the reference to what comes back."""
        self._ends: list[End] = []
        self._memory: dict[RunConfig, int] = {}
        self._profiles: tuple[list[str], Any] | None = None

    def has_room(self) -> bool:
        return True  # Ray has the cells wait

    def start(self, cells: Cells, cell: Cell, *, until: float | None = None) -> None:
        sent = _Sent(cells, cell, self._needs(cells, cell))
        # of a run here that was killed
        shutil.rmtree(cells.folder(cell), ignore_errors=True)
        why_nowhere = sent.needs.why_nowhere(self._nodes)
        if why_nowhere:
            self._end(sent, Outcome(reason=why_nowhere, files={LOG: b""}))
            return
        order = Order(
            spec=cells.spec(cell),
            runner=child.RUNNER,
            num_threads=sent.needs.num_cpus,
            cwd=os.getcwd(),
            inputs=self._inputs,
            until=until,
        )
        options = self._task.options(
            num_cpus=sent.needs.num_cpus,
            num_gpus=sent.needs.num_gpus,
            memory=sent.needs.memory_bytes,
            max_retries=LOST_RETRIES,
            name=str(cell),
        )
        self._sent[options.remote(order, self._known_profiles(cells))] = sent

    def ended(self, seconds: float) -> list[End]:
        self._give_up_what_fits_nowhere()
        if self._sent and not self._ends:
            done, _ = self._ray.wait(list(self._sent), num_returns=1, timeout=seconds)
            for reference in done:
                self._end(self._sent.pop(reference), self._outcome(reference))
        ends, self._ends = self._ends, []
        return ends

    def stop(self) -> None:
        for reference in self._sent:
            self._ray.cancel(reference)
        if self._sent:
            # a task that is interrupted ends its process
            self._ray.wait(list(self._sent), num_returns=len(self._sent), timeout=_CANCEL_SECONDS)
        self._sent.clear()

    def _needs(self, cells: Cells, cell: Cell) -> Needs:
        """The share of a node, with the memory that the planner foresees where it does."""
        if cell.is_base:
            return self._share
        # what makes no difference to memory is the same for all
        run = cells.config.run_config(cells.candidate(cell), "-", 1.0, 0, Path("-"))
        if run not in self._memory:
            foreseen = self._foresee(run, bool(self._share.num_gpus))
            self._memory[run] = self._share.memory_bytes if foreseen is None else foreseen
        return replace(self._share, memory_bytes=self._memory[run])

    def _known_profiles(self, cells: Cells) -> Any:
        """Reference to the profiles that there are by now."""
        root = cells.root / "profiles"
        names = sorted(path.name for path in root.iterdir()) if root.exists() else []
        if self._profiles is None or self._profiles[0] != names:
            self._profiles = names, self._ray.put(read_files(root))
        return self._profiles[1]

    def _outcome(self, reference: Any) -> Outcome:
        """What came back; where nothing did, why."""
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            return Outcome(reason=f"killed: {in_a_line(error)}", files={LOG: _said(error)})
        except errors.RayError as error:
            return Outcome(reason=f"Ray: {in_a_line(error)}", files={LOG: _said(error)})
        return outcome

    def _end(self, sent: _Sent, outcome: Outcome) -> None:
        """Write what came back, and keep how it ended for the next who asks."""
        if outcome.is_begun:
            add_folders(sent.cells.root / "profiles", outcome.profiles)
            write_files(sent.cells.folder(sent.cell), outcome.files)
        self._ends.append(End(sent.cell, outcome.reason, outcome.is_begun))

    def _give_up_what_fits_nowhere(self) -> None:
        """Ray would have a cell wait for ever when the only node that could run it is lost."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._nodes, self._looked = nodes_of(self._ray), time.monotonic()
        for reference, sent in list(self._sent.items()):
            why_nowhere = sent.needs.why_nowhere(self._nodes)
            if why_nowhere:
                self._ray.cancel(reference, force=True)
                self._end(self._sent.pop(reference), Outcome(reason=why_nowhere, files={LOG: b""}))


def inputs_of(config: ComparisonConfig) -> tuple[str, ...]:
    """The paths that a comparison's runs read, absolute but for `~`, which is the node's.

    A task that is not embedded is a path. So is a model or a data set that is here, or is written as one.
    """
    named = [config.model]
    for run in (config.run, *(candidate.run for candidate in config.candidates)):
        named += [str(run[key]) for key in _READ_KEYS if run.get(key)]
    found = [name for name in config.tasks if name not in task_names()]
    found += [name for name in named if name != "embedded" and _is_path(name)]
    return tuple(dict.fromkeys(name if name.startswith("~") else os.path.abspath(name) for name in found))


def _is_path(name: str) -> bool:
    return name.startswith(("/", "~", "./", "../")) or Path(name).exists()


def _said(error: Exception) -> bytes:
    return str(error).encode()
