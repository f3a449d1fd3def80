"""Every command of docs/scale.md that plans or trains, run as it stands."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from distributed.launch import environment, losses
from documented_commands import blocks, words_of
from metier import embedded

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")}
SECONDS = 420
"""The embedded model in two to four processes on two cores, their start included."""


def commands(section: str) -> list[str]:
    return [line for block in blocks(SECTIONS[section]) for line in block.splitlines()]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with what the page's commands take."""
    (tmp_path / "run.yaml").write_text(blocks(PAGE, "yaml")[0])
    (tmp_path / "fsdp.yaml").write_text(blocks(PAGE, "yaml")[1])
    shutil.copy(embedded.task_path("synopsis", "train"), tmp_path / "train.jsonl")
    return tmp_path


def started(line: str, here: Path) -> subprocess.Popen:
    """The command, found beside this very Python."""
    log = (here / f"log-{len(list(here.glob('log-*')))}").open("w+")
    return subprocess.Popen(words_of(line), cwd=here, env=environment(), stdout=log, stderr=subprocess.STDOUT)


def check(line: str, here: Path, *, steps: int = 6) -> None:
    assert started(line, here).wait(timeout=SECONDS) == 0, "\n".join(p.read_text() for p in here.glob("log-*"))
    check_run(here, steps=steps)


def check_run(here: Path, *, steps: int = 6) -> None:
    assert list(losses(here / "runs" / "mine")) == list(range(1, steps + 1))
    assert (here / "runs" / "mine" / "adapter" / "adapter_model.safetensors").exists()


ONE_LINE = {
    "A copy of the weights in each process": 0,
    "Weights sharded over the processes": 0,
    "Stopped, killed, resumed": 0,
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("section", ONE_LINE)
def test_a_line_under_torchrun(section: str, here: Path) -> None:
    check(commands(section)[ONE_LINE[section]], here)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_line_of_accelerate(here: Path) -> None:
    check(commands("Weights sharded over the processes")[1], here)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_line_of_several_machines(here: Path) -> None:
    (line,) = commands("Several machines")
    machines = [started(line, here) for _ in range(2)]
    assert [machine.wait(timeout=SECONDS) for machine in machines] == [0, 0]
    check_run(here)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_the_lines_that_resume(number: int, here: Path) -> None:
    section = commands("Stopped, killed, resumed")
    check(section[0], here)
    shutil.rmtree(here / "runs" / "mine" / "checkpoints" / "checkpoint-6")
    shutil.rmtree(here / "runs" / "mine" / "adapter")
    check(section[number], here)


@pytest.mark.distributed
def test_the_line_that_plans(here: Path) -> None:
    (line,) = commands("What it will take")
    assert started(line, here).wait(timeout=SECONDS) == 0, "\n".join(p.read_text() for p in here.glob("log-*"))
    said = (here / "log-0").read_text()
    assert "each of 2 processes has" in said
    assert "esft fsdp2 sends from each process, in a step" in said


def test_no_command_of_the_page_is_without_a_test() -> None:
    training = {name: commands(name) for name in SECTIONS if "Ray" not in name}
    tested = {**dict.fromkeys(ONE_LINE, 1), "Weights sharded over the processes": 2, "Several machines": 1}
    tested["What it will take"] = 1
    tested["Stopped, killed, resumed"] = 3
    assert {name: len(lines) for name, lines in training.items() if lines} == tested
