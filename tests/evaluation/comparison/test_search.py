"""The search: which candidates there are, which fit, and who goes on."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from metier.config_reading import load_run_config
from metier.errors import ConfigError
from metier.evaluation.comparison import child
from metier.evaluation.comparison.cells import Cell, Cells
from metier.evaluation.comparison.here import Here
from metier.evaluation.comparison.search import SearchConfig, _ranked, load_search, search
from metier.planning.plan import why_not

RUNNER = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
spec = json.loads((folder / "cell.json").read_text())
label, steps = spec["cell"]["label"], spec["run"]["max_steps"]
if "vera" in label and steps > 1:
    raise ValueError("it diverged")
# late learners: what leads at first is not what wins
score = {"lora": 10 + steps, "ia3": 12.0, "vera": 11.0}.get(label.split()[0], 0.0) + spec["cell"]["learning_rate"]
found = {"validation": score, "test": {"metric": "m", "score": 0.0, "item_scores": [0.0]}, "seconds": 0.1}
# whole or not at all, as a cell does
(folder / "part").write_text(json.dumps(found))
(folder / "part").replace(folder / "result.json")
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up_runner.py").write_text(RUNNER)
    monkeypatch.setattr(child, "RUNNER", "made_up_runner")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def config(tmp_path: Path, **changes) -> SearchConfig:
    methods = (
        {"method": "lora", "learning_rates": [1e-3, 1e-2], "try": {"r": [4, 8]}},
        {"method": "ia3", "learning_rates": [1e-2]},
        {"method": "vera", "learning_rates": [1e-2]},
    )
    values = {
        "output_dir": str(tmp_path / "out"),
        "model": "embedded",
        "task": "synopsis",
        "methods": methods,
        "rungs": (1, 4),
    }
    return SearchConfig(**{**values, **changes})


def test_candidates_are_methods_options_rates_and_places_that_they_can_go(tmp_path: Path) -> None:
    labels = [c.label for c in config(tmp_path, places=("attention", "routed")).candidates()]
    assert len(labels) == 2 * 2 * 2 + 1 + 1
    assert "lora (r 4, targets routed) at 0.01" in labels
    assert "vera (targets attention) at 0.01" in labels
    assert not any("vera (targets routed)" in label for label in labels)


def test_the_better_half_runs_on_and_the_last_round_decides(tmp_path: Path, runner) -> None:
    told = Console(file=StringIO(), width=300)
    best = search(config(tmp_path), lambda run: "", Here(4), console=told)
    content = json.loads((tmp_path / "out" / "search.json").read_text())
    first, last = content["rounds"]
    assert first["ranked"][0][0] == "ia3 at 0.01"
    assert len(first["ranked"]) == 6
    assert len(last["ranked"]) == 3
    assert content["best"] == last["ranked"][0][0] == "lora (r 4) at 0.01"
    run = load_run_config(best)
    # at full length, on records that are there
    assert (run.method, run.method_options, run.learning_rate, run.max_steps) == ("lora", {"r": 4}, 0.01, None)
    assert Path(run.dataset).exists()


def test_of_equal_scores_what_is_foreseen_to_take_less_goes_first(tmp_path: Path, write) -> None:
    search_config = config(tmp_path)
    cells = Cells(search_config.round(search_config.candidates(), 1))
    foreseen = {"ia3 at 0.01": (200, 1.0), "vera at 0.01": (100, 3.0), "lora (r 4) at 0.01": (None, 0.1)}
    foreseen |= {"lora (r 8) at 0.01": (100, 2.0), "lora (r 4) at 0.001": (1, 1.0), "lora (r 8) at 0.001": (1, 1.0)}
    for candidate in cells.config.candidates:
        peak, seconds = foreseen[candidate.label]
        cell = Cell(task="synopsis", label=candidate.label, learning_rate=candidate.learning_rate, seed=0)
        score = 5.0 if candidate.learning_rate == 0.01 else 4.0
        write(cells, cell, score, foreseen_peak_bytes=peak, foreseen_step_seconds=seconds)
    ranked = [one.candidate.label for one in _ranked(cells, search_config)]
    assert ranked[:4] == ["lora (r 8) at 0.01", "vera at 0.01", "ia3 at 0.01", "lora (r 4) at 0.01"]


def test_what_does_not_fit_is_not_run(tmp_path: Path, runner) -> None:
    told = Console(file=StringIO(), width=300)
    search(config(tmp_path), lambda run: "too large" if run.method == "lora" else "", Here(4), console=told)
    content = json.loads((tmp_path / "out" / "search.json").read_text())
    assert list(content["left_out"].values()) == ["too large"] * 4
    assert content["best"] == "ia3 at 0.01"
    with pytest.raises(ConfigError, match=r"no candidate is left: too large\. Give more memory"):
        search(config(tmp_path), lambda run: "too large", Here(4), console=told)


def test_the_planner_says_what_fits(tmp_path: Path) -> None:
    run = config(tmp_path).round(config(tmp_path).candidates(), 1)
    one = run.run_config(run.candidates[0], "synopsis", 1e-3, 0, tmp_path)
    assert why_not(one, "64GiB") == ""
    assert "more than there is" in why_not(one, "200MiB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1.0}, "keep must be in (0, 1), got 1.0"),
        ({"rungs": (4, 2)}, "rungs that rise, got [4, 2]"),
        ({"places": ("attention", "atention,shared")}, "places: got 'atention', expected some of attention, dense"),
        ({"methods": ({"method": "lora"},)}, "methods[0]: expected `method` and a list of `learning_rates`"),
        (
            {"methods": ({"method": "lorra", "learning_rates": [1]},)},
            "got 'lorra', which is no method. Did you mean 'lora'?",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(tmp_path, **change).candidates()


def test_a_file_is_read_and_its_keys_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    text = "output_dir: out\nmodel: embedded\ntask: synopsis\nmethods: [{method: ia3, learning_rates: [0.1]}]\n"
    path.write_text(text + "rungs: [2, 4]\n")
    assert load_search(path).rungs == (2, 4)
    path.write_text(text + "rung: [2]\n")
    with pytest.raises(ConfigError, match=r"unknown key 'rung'\. Did you mean 'rungs'\?"):
        load_search(path)
