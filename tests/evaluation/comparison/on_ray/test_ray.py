"""Cells on a real Ray cluster of this machine: their runs are made up, what Ray does with them is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from metier.errors import RunError
from metier.evaluation.comparison.cells import Cells
from metier.evaluation.comparison.config import load_comparison
from metier.evaluation.comparison.here import Here
from metier.evaluation.comparison.on_ray.place import ray_place
from metier.evaluation.comparison.schedule import run_cells

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

GIB = 1 << 30
SECONDS = 600
"""Of a comparison of some cells of a second each, on a loaded machine, Ray's start included."""
DRIVER = """
import sys
from metier.evaluation.comparison import child
child.RUNNER = "made_up_runner"
from metier.cli import main
main()
"""


def little(run: Any, has_accelerator: bool) -> int:
    return GIB // 8


def run_on_ray(cells: Cells, told: Any, *, foresee: Any = little, **options: Any) -> None:
    with ray_place(cells.config, foresee, num_jobs=2, **options) as place:
        run_cells(cells, place, console=told)
    assert not ray.is_initialized()


def results(cells: Cells) -> dict[str, Any]:
    """Of all cells, without what depends on where and when each ran."""
    found = {str(cell): cells.result(cell) for cell in cells.known()}
    return {name: result and {**result, "folder": None, "known": None} for name, result in found.items()}


def session(pid: int) -> list[str]:
    """Processes that one has started, and theirs, as far as they live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(session) == pid and state != "Z":
            found.append(path.parent.name)
    return found


def until(condition: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.1)


def test_all_cells_run_the_sweep_first_and_find_what_they_find_here(comparison, runner, told, tmp_path: Path) -> None:
    # ESFT is best at its highest rate: the runs with other seeds depend on it
    runner("score = cell['learning_rate'] if cell['label'] == 'ESFT' else 1.0")
    cells = Cells(comparison())
    run_on_ray(cells, told)
    assert cells.pending() == cells.failed() == []
    assert len(list(cells.known())) == cells.num_needed() == 16
    assert {cell.learning_rate for cell in cells.known() if cell.label == "ESFT" and cell.seed} == {3e-3}
    here = Cells(comparison(output_dir=str(tmp_path / "here")))
    run_cells(here, Here(2), console=told)
    assert results(cells) == results(here)
    # begun there, it is done here
    again = Cells(comparison())
    assert again.pending() == []
    assert "16 of 16" in told.file.getvalue()


def test_a_comparison_goes_on_here_and_there(comparison, runner, told) -> None:
    runner()
    cells = Cells(comparison(seeds=(0,)))
    first = cells.pending()[0]
    here = Here()
    here.start(cells, first)
    while not here.ended(0.2):
        pass
    ran_here = cells.result(first)
    assert ran_here is not None
    run_on_ray(Cells(comparison(seeds=(0,))), told)
    cells = Cells(comparison(seeds=(0,)))
    assert cells.pending() == []
    assert cells.result(first) == ran_here
    run_cells(Cells(comparison(seeds=(0, 1))), Here(3), console=told)
    assert Cells(comparison(seeds=(0, 1))).pending() == []


def test_a_crash_loses_one_cell_and_a_cell_too_large_is_named(comparison, runner, told) -> None:
    runner(
        "if cell['label'] == 'LoRA': os.kill(os.getpid(), 9)\nif cell['learning_rate'] > 2e-3: raise ValueError('no')"
    )
    cells = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0, 3.0)))
    begun = time.monotonic()
    run_on_ray(cells, told, foresee=lambda run, _: 1 << 40 if run.method == "full" else GIB // 8)
    assert time.monotonic() - begun < SECONDS
    assert cells.pending() == []
    why = {f"{cell.label} {cell.learning_rate:g}": cells.failure(cell) for cell in cells.failed()}
    assert sorted(why) == ["ESFT 0.003", "LoRA 0.01", "LoRA 0.03", "full fine-tuning 3e-05", "full fine-tuning 9e-05"]
    assert why["LoRA 0.01"] == "killed\nruns LoRA"
    assert why["ESFT 0.003"].startswith("exit code 1\n")
    assert why["ESFT 0.003"].endswith("ValueError: no")
    nowhere = "it needs 1 CPU, 1 TiB of memory, and no node of the cluster has that: the largest is "
    assert why["full fine-tuning 3e-05"].startswith(nowhere)


def test_a_worker_that_is_lost_once_is_run_again_by_ray_and_twice_is_told(comparison, runner, told, tmp_path) -> None:
    # the process of the cell kills the worker that waits for it, which is what the loss of a node looks like
    runner(
        f"tries = Path({str(tmp_path)!r}, f'tries-{{cell[\"label\"]}}')\n"
        "with tries.open('a') as file: print(os.getpid(), file=file)\n"
        "is_first = len(tries.read_text().split()) == 1\n"
        "if cell['label'] == 'ESFT' and is_first or cell['label'] == 'LoRA':\n"
        "    os.kill(os.getppid(), 9)\n"
        "    time.sleep(60)"
    )
    cells = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0,)))
    run_on_ray(cells, told)
    assert [cell.label for cell in cells.failed()] == ["LoRA"]
    assert cells.failure(cells.failed()[0]).startswith("killed: ")
    tries = {path.name: path.read_text().split() for path in tmp_path.glob("tries-*")}
    assert {name: len(pids) for name, pids in tries.items()} == {
        "tries-untouched base": 1,
        "tries-full fine-tuning": 1,
        "tries-ESFT": 2,
        "tries-LoRA": 2,
    }
    # their processes ended with the workers
    until(lambda: not [pid for pids in tries.values() for pid in pids if Path(f"/proc/{pid}").exists()])
    assert "(raylet)" not in told.file.getvalue()


def test_a_cell_that_ray_kills_for_its_memory_is_told_and_no_hang(
    comparison, runner, told, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # by Ray's measure any node has too little memory
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setattr("metier.evaluation.comparison.on_ray.place.check_nodes", lambda *_: None)
    runner("time.sleep(60)")
    cells = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0,)))
    run_on_ray(cells, told)
    assert len(cells.failed()) == 4
    why = {cells.failure(cell).splitlines()[0].partition("low on memory")[0] for cell in cells.failed()}
    # Ray may kill both that run at once
    assert why <= {f"killed: {number} worker(s) were killed due to the node running " for number in (1, 2)}
    # Ray's own pages about it are not among the lines of progress
    assert capfd.readouterr().out == ""


def test_what_is_not_on_a_node_is_said_before_anything_runs(comparison, runner, told, tmp_path: Path) -> None:
    runner()
    gone = tmp_path / "gone"
    gone.mkdir()
    config = comparison(model=str(gone))
    gone.rmdir()
    with pytest.raises(RunError, match=rf"compare: node .* has no {gone}, which the comparison reads\.\nPut it there"):
        run_on_ray(Cells(config), told)
    assert not ray.is_initialized()
    assert not Path(config.output_dir).exists()


@pytest.fixture
def started(runner, tmp_path: Path):
    """Starts `metier compare SPEC --on ray` of four cells of `seconds` each, in a process of its own."""
    processes = []
    methods = [{"method": "esft", "learning_rate": 1e-3, "top_p": 0.5}, {"method": "ia3", "learning_rate": 1e-2}]
    spec = {"model": "embedded", "tasks": ["synopsis"], "seeds": [0], "learning_rate_factors": [1], "methods": methods}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**spec, "output_dir": str(tmp_path / "out")}))

    def start(what: str = "") -> tuple[subprocess.Popen[str], Cells]:
        runner(f"(Path({str(tmp_path)!r}) / f'pid-{{os.getpid()}}').touch()\n{what}")
        command = [sys.executable, "-c", DRIVER, "compare", "spec.yaml", "--on", "ray", "--jobs", "2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        wide = {**os.environ, "COLUMNS": "200"}
        processes.append(subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, env=wide, **pipes))
        return processes[-1], Cells(load_comparison(tmp_path / "spec.yaml"))

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def pids(folder: Path) -> list[str]:
    return [path.name.removeprefix("pid-") for path in folder.glob("pid-*")]


HALF = "if cell['label'] != 'untouched base': time.sleep(600)"


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_stopped_goes_on(started, tmp_path: Path, kill: signal.Signals) -> None:
    process, cells = started(HALF)
    until(lambda: len(pids(tmp_path)) >= 3 and len(cells.pending()) == 3)
    process.send_signal(kill)
    process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert len(pids(tmp_path)) == 3
    # neither cells nor Ray are left
    until(lambda: not session(process.pid))
    first = next(cells.known())
    folder = cells.folder(first) / "result.json"
    changed = folder.stat().st_mtime_ns
    assert cells.failed() == []
    process, cells = started()
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert cells.pending() == cells.failed() == []
    assert folder.stat().st_mtime_ns == changed
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["num_done"] == 4
    # nothing of Ray's in the lines of progress
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["2 of 4", "3 of 4", "4 of 4"]
    assert lines[-1].startswith("Report: ")
    assert err == ""


def patient(start: Any) -> Any:
    """What starts within three times: Ray waits 30 seconds, which a loaded machine exceeds."""
    for _ in range(2):
        with suppress(Exception):
            return start()
    return start()


@pytest.fixture
def cluster(runner, monkeypatch: pytest.MonkeyPatch):
    """A cluster of two nodes, both on this machine: one with three CPUs, one with one and more memory."""
    from ray.cluster_utils import Cluster

    runner()  # nodes look for it where they are told to as they start
    # Ray's workers step back for other programs
    monkeypatch.setenv("RAY_worker_niceness", "0")
    common = {"object_store_memory": 100 << 20, "include_dashboard": False}
    found = patient(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "memory": 2 * GIB, **common}))
    found.larger = patient(lambda: found.add_node(num_cpus=1, memory=8 * GIB, object_store_memory=100 << 20))
    found.wait_for_nodes()
    yield found
    ray.shutdown()
    found.shutdown()


def test_a_cluster_that_runs_already_is_joined_and_left_as_it_was(
    comparison, runner, told, cluster, monkeypatch
) -> None:
    runner()
    cells = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0,)))
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    # one cell fits on the larger node alone
    run_on_ray(cells, told, foresee=lambda run, _: (6 if run.method == "esft" else 1) * GIB)
    assert cells.pending() == cells.failed() == []
    assert {cells.result(cell)["threads"] for cell in cells.known()} == {"1"}
    monkeypatch.delenv("RAY_ADDRESS")
    more = Cells(comparison(seeds=(0, 1), learning_rate_factors=(1.0,)))
    run_on_ray(more, told, address=cluster.address)
    assert more.pending() == more.failed() == []


def test_cells_of_a_node_that_is_lost_run_on_another_and_those_that_cannot_are_given_up(
    comparison, runner, told, cluster, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("metier.evaluation.comparison.on_ray.place._LOOK_SECONDS", 1)
    runner(f"(Path({str(tmp_path)!r}) / f'pid-{{os.getpid()}}').touch()\ntime.sleep(3)")
    cells = Cells(comparison(seeds=(0,), learning_rate_factors=(1.0,)))
    taken = []

    def lose(run: Any, _: bool) -> int:
        taken.append(run.method)
        if run.method == "esft":
            cluster.remove_node(cluster.larger, allow_graceful=False)
        return (6 if run.method == "esft" else 1) * GIB

    run_on_ray(cells, told, foresee=lose, address=cluster.address)
    assert [cell.label for cell in cells.failed()] == ["ESFT"]
    assert cells.failure(cells.failed()[0]).startswith(
        "it needs 1 CPU, 6 GiB of memory, and no node of the cluster has"
    )
    assert cells.pending() == []
