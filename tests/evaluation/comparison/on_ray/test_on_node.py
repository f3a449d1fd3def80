"""A cell on a node: it runs in a folder of its own, which comes back as bytes, and its end is told as on one machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

from metier.evaluation.comparison import child
from metier.evaluation.comparison.on_ray.on_node import Order, carry_out


def order(cwd: Path, **changes) -> Order:
    values = {
        "spec": {"cell": {"label": "LoRA", "seed": 1}},
        "runner": child.RUNNER,
        "num_threads": 3,
        "cwd": str(cwd),
        "inputs": (),
        "until": None,
    }
    return Order(**{**values, **changes})


def test_the_folder_comes_back_without_what_is_large(runner, tmp_path: Path) -> None:
    runner()
    outcome = carry_out(order(tmp_path), {"sums-1/profile.json": b"{}"})
    assert (outcome.reason, outcome.is_begun) == ("", True)
    assert sorted(outcome.files) == ["cell.json", "log.txt", "result.json", "run/plan.json"]
    found = json.loads(outcome.files["result.json"])
    assert (found["cwd"], found["threads"], found["known"]) == (str(tmp_path), "3", ["sums-1"])
    assert outcome.files["log.txt"] == b"runs LoRA\n"
    # that which is known already stays where it is
    assert outcome.profiles == {"LoRA/profile.json": b"{}"}
    assert not Path(found["folder"]).exists()


def test_a_crash_comes_back_with_its_log(runner, tmp_path: Path) -> None:
    runner("os.kill(os.getpid(), 9)")
    outcome = carry_out(order(tmp_path), {})
    assert outcome.reason == "killed"
    assert sorted(outcome.files) == ["cell.json", "log.txt"]
    assert outcome.files["log.txt"] == b"runs LoRA\n"
    assert outcome.profiles == {}


def test_what_is_not_on_the_node_is_named_and_nothing_runs(tmp_path: Path) -> None:
    outcome = carry_out(order(tmp_path, inputs=(str(tmp_path), "/no/such/model")), {})
    assert outcome.reason.startswith("node ")
    assert outcome.reason.endswith(" has no /no/such/model")


def test_it_is_not_begun_when_time_is_up(tmp_path: Path) -> None:
    outcome = carry_out(order(tmp_path, until=time.time() - 1), {})
    assert not outcome.is_begun
    assert outcome.files == {}


def test_a_working_folder_that_the_node_has_not_is_no_error(runner, tmp_path: Path) -> None:
    runner()
    assert carry_out(order(tmp_path / "not-there"), {}).reason == ""
