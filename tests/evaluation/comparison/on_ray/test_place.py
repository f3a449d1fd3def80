"""Cells on a cluster that is made up: what Ray is asked for, and what becomes of what it gives back."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metier.evaluation.comparison.cells import Cells
from metier.evaluation.comparison.on_ray.needs import share_of_node, usable_nodes
from metier.evaluation.comparison.on_ray.place import RayPlace, inputs_of
from metier.evaluation.comparison.schedule import run_cells

GIB = 1 << 30


class Errors:
    """The exceptions that Ray has for us."""

    class RayError(Exception): ...

    class WorkerCrashedError(RayError): ...

    class NodeDiedError(RayError): ...

    class OutOfMemoryError(RayError): ...


class MadeUpRay:
    """Runs a task in this process as soon as it is waited for; one whose name has a key of `failing` raises instead."""

    exceptions = Errors

    def __init__(self, **resources: float) -> None:
        self.resources = {"CPU": 4.0, "memory": 8.0 * GIB, **resources}
        self.asked: dict[str, dict[str, Any]] = {}
        self.failing: dict[str, Exception] = {}
        self.waiting: dict[int, tuple[Any, tuple[Any, ...], str]] = {}
        self.cancelled: list[str] = []
        self._references = iter(range(10**6))

    def nodes(self) -> list[dict[str, Any]]:
        name = {"NodeID": "1", "NodeManagerHostname": "one", "NodeManagerAddress": "10.0.0.1"}
        return [{**name, "Alive": bool(self.resources), "Resources": self.resources}]

    def remote(self, function: Any) -> Any:
        ray = self

        class Task:
            def options(self, *, name: str, **asked: Any) -> Any:
                ray.asked[name] = asked

                class Options:
                    def remote(self, *arguments: Any) -> int:
                        reference = next(ray._references)
                        ray.waiting[reference] = (function, arguments, name)
                        return reference

                return Options()

        return Task()

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: int) -> Any:
        function, arguments, name = self.waiting.pop(reference)
        for part, error in self.failing.items():
            if part in name:
                raise error
        return function(*arguments)

    def cancel(self, reference: int, *, force: bool = False) -> None:
        self.cancelled.append(self.waiting[reference][2])


def foreseen(run: Any, has_accelerator: bool) -> int | None:
    """A GiB for a method that selects experts, and nothing that could be said of others."""
    return GIB if run.method == "esft" else None


def place_on(ray: MadeUpRay, *, num_jobs: int = 1, inputs: tuple[str, ...] = (), foresee: Any = foreseen) -> RayPlace:
    return RayPlace(ray, foresee, share_of_node(usable_nodes(ray.nodes()), num_jobs), inputs)


def test_all_cells_run_and_leave_what_they_leave_on_one_machine(comparison, runner, told) -> None:
    runner()
    cells = Cells(comparison(seeds=(0, 1), learning_rate_factors=(1.0,)))
    run_cells(cells, place_on(MadeUpRay()), console=told)
    assert cells.pending() == cells.failed() == []
    for cell in cells.known():
        left = {str(path.relative_to(cells.folder(cell))) for path in cells.folder(cell).rglob("*") if path.is_file()}
        assert left == {"cell.json", "log.txt", "result.json", "run/plan.json"}
    # a profile that one has made, the next one has
    assert (cells.root / "profiles" / "LoRA" / "profile.json").exists()
    assert "LoRA" in cells.result(list(cells.known())[-1])["known"]
    assert "6 of 7  synopsis: ESFT, learning rate" in told.file.getvalue()


def test_a_cell_asks_for_its_share_and_for_the_memory_that_is_foreseen(comparison) -> None:
    cells, ray = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0,))), MadeUpRay()
    place = place_on(ray, num_jobs=2)
    for cell in cells.pending():
        place.start(cells, cell)
    memory = {name.split(": ")[1].split(",")[0]: asked["memory"] for name, asked in ray.asked.items()}
    # of which nothing is foreseen, the half of the node that two at once leave it
    share = 4 * GIB
    assert memory == {"untouched base": share, "full fine-tuning": share, "ESFT": GIB, "LoRA": share}
    assert {(asked["num_cpus"], asked["num_gpus"], asked["max_retries"]) for asked in ray.asked.values()} == {(2, 0, 1)}
    orders = [arguments[0] for _, arguments, _ in ray.waiting.values()]
    assert {order.num_threads for order in orders} == {2}


def test_memory_is_foreseen_once_for_runs_that_take_the_same(comparison) -> None:
    asked: list[tuple[str, bool]] = []
    place = place_on(MadeUpRay(GPU=1.0), foresee=lambda run, has_gpu: asked.append((run.method, has_gpu)) or GIB)
    cells = Cells(comparison())
    for cell in cells.pending():
        place.start(cells, cell)
    assert asked == [("full", True), ("esft", True), ("lora", True)]


def test_a_cell_larger_than_any_node_is_named_and_the_others_run(comparison, runner, told) -> None:
    runner()
    cells = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0,)))
    sizes = {"esft": 9 * GIB}
    run_cells(cells, place_on(MadeUpRay(), foresee=lambda run, _: sizes.get(run.method, GIB)), console=told)
    assert [cell.label for cell in cells.failed()] == ["ESFT"]
    assert cells.failure(cells.failed()[0]).startswith("it needs 4 CPUs, 9 GiB of memory, and no node of the cluster")
    assert "synopsis: ESFT, learning rate 0.001, seed 0: failed (it needs 4 CPUs, 9 GiB" in told.file.getvalue()
    assert cells.pending() == []


def test_a_crash_and_a_lost_worker_are_told_as_on_one_machine(comparison, runner, told) -> None:
    runner("if cell['label'] == 'ESFT': os.kill(os.getpid(), 9)")
    cells, ray = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0,))), MadeUpRay()
    ray.failing = {
        "LoRA": Errors.OutOfMemoryError("the node ran out of memory"),
        "full": Errors.RayError("Traceback:\n\n  the node has no metier\n"),
    }
    run_cells(cells, place_on(ray), console=told)
    why = {cell.label: cells.failure(cell).splitlines() for cell in cells.failed()}
    assert why == {
        "full fine-tuning": ["Ray: the node has no metier", "Traceback:", "", "  the node has no metier"],
        "ESFT": ["killed", "runs ESFT"],
        "LoRA": ["killed: the node ran out of memory", "the node ran out of memory"],
    }


def test_what_a_killed_run_here_has_left_is_gone(comparison) -> None:
    cells = Cells(comparison())
    cell = cells.pending()[1]
    left = cells.folder(cell) / "run" / "adapter" / "adapter_model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("half of it")
    place_on(MadeUpRay()).start(cells, cell)
    assert not left.exists()


def test_no_cell_is_begun_when_time_is_up_and_none_counts_as_failed(comparison, told, monkeypatch) -> None:
    cells, ray = Cells(comparison()), MadeUpRay()
    # by the node's clock all are too late
    monkeypatch.setattr("metier.evaluation.comparison.on_ray.on_node.time", SimpleNamespace(time=lambda: 1e12))
    run_cells(cells, place_on(ray), console=told, minutes=0.005)
    assert len(ray.asked) == len(cells.pending()) == len(list(cells.known()))
    assert told.file.getvalue() == ""
    assert not list(cells.root.rglob("*.txt"))


def test_cells_that_wait_for_a_node_that_is_lost_are_given_up(comparison, monkeypatch) -> None:
    cells, ray = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0,))), MadeUpRay()
    place = place_on(ray)
    ray.wait = lambda references, **_: ([], references)  # type: ignore[method-assign]
    for cell in cells.pending():
        place.start(cells, cell)
    assert place.ended(0) == []
    ray.resources = {}
    monkeypatch.setattr("metier.evaluation.comparison.on_ray.place._LOOK_SECONDS", 0)
    assert {end.reason for end in place.ended(0)} == {"the cluster has no node left"}
    assert len(ray.cancelled) == len(cells.pending())


def test_what_runs_is_cancelled_on_an_interruption(comparison, told, monkeypatch) -> None:
    cells, ray = Cells(comparison()), MadeUpRay()
    place = place_on(ray)

    def interrupted(seconds: float) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, "ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, place, console=told)
    assert len(ray.cancelled) == 10


def test_paths_that_runs_read_are_found(comparison, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "chosen.json").write_text("{}")
    config = comparison(tasks=("synopsis", "my/task"), model="base", run={"general_dataset": "tatsu-lab/alpaca"})
    first, *others = config.candidates
    config = replace(config, candidates=(first, *(replace(one, run={"eval_dataset": "~/c.json"}) for one in others)))
    assert inputs_of(config) == (str(tmp_path / "my/task"), str(tmp_path / "base"), "~/c.json")
    assert inputs_of(comparison()) == ()
    assert inputs_of(comparison(model="Qwen/Qwen3-30B-A3B")) == ()
    assert inputs_of(comparison(model="/models/q")) == ("/models/q",)
    assert os.path.isabs(inputs_of(comparison(model="base"))[0])
    assert json.dumps(inputs_of(config))
