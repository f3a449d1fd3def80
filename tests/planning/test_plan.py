"""What runs of a model take, which of them fit, and what makes one fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from metier.cli import app
from metier.config import RunConfig
from metier.errors import ConfigError, ModelError, UnsupportedModelError
from metier.models.skeleton import model_config
from metier.planning import budget, estimate, fit, table
from metier.planning.clock import clock_here
from metier.planning.estimate import KINDS, Estimator
from metier.planning.fit import Budget, Change, changed, smallest_change
from metier.planning.kv_cache import kv_cache
from metier.planning.links import World
from metier.planning.machine import fingerprint
from metier.planning.measured import ON_DENSE, ON_MOE
from metier.planning.plan import METHODS, Plan, plan
from metier.planning.sizes import read_bytes
from metier.planning.spelling import count, duration, size
from metier.planning.step_time import moved_bytes
from tiny_models import tiny_model

MIB = 1 << 20


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("deepseek_v2").config.save_pretrained(folder)
    return folder


def _run(base: Path, **options: object) -> RunConfig:
    values = {"model": str(base), "dataset": "-", "output_dir": "-", "select_top_k": 2, "max_length": 64}
    return RunConfig(**{**values, "per_device_train_batch_size": 4, "dtype": "float32", **options})


def _estimator(base: Path) -> Estimator:
    return Estimator(tiny_model("deepseek_v2").config)


def test_every_method_has_a_row_and_what_fits_is_marked(base):
    made = plan(_run(base), methods=METHODS, device_memory="8GiB")
    assert [row.config.method for row in made.rows] == list(METHODS)
    fits = {row.config.method: row.fits for row in made.rows}
    assert fits == {"esft": True, "expert_lora": True, "lora": True, "full": True, "meft": True}
    assert made.recommended is not None
    assert made.recommended.config.method == "full"


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("has_host", [True, False])
def test_what_is_computed_again_leaves_holes_on_a_cpu(base, monkeypatch, checkpointing: bool, has_host: bool):
    config, model = _run(base, gradient_checkpointing=checkpointing), tiny_model("deepseek_v2").config
    with_holes = Estimator(model, has_host=has_host)(config).device_bytes
    monkeypatch.setattr(estimate, "HOLES", 0.0)
    without = Estimator(model, has_host=has_host)(config).device_bytes
    holes = int(0.06 * without["temporaries"]) if checkpointing and not has_host else 0
    assert with_holes == without | {"temporaries": without["temporaries"] + holes}


def test_bytes_are_those_of_the_state_and_the_trace(base):
    config = _run(base)
    found = _estimator(base)(config)
    assert tuple(found.device_bytes) == KINDS
    state = found.state
    assert found.device_bytes["trained weights"] == state.trained_bytes == 4 * state.num_trained
    assert found.device_bytes["optimizer state"] == 2 * state.trained_bytes
    assert found.device_bytes["frozen weights"] == state.base_bytes + state.kept_bytes
    assert found.trace is not None
    both = sum(found.device_bytes[kind] for kind in ("activations", "temporaries", "gradients"))
    assert both == found.trace.peak_bytes
    assert found.delta_bytes == 4 * state.num_trained
    assert dataclasses.replace(found, base_itemsize=2).delta_bytes == 2 * state.num_trained


def test_full_fine_tuning_has_no_frozen_weights(base):
    found = _estimator(base)(_run(base, method="full", select_top_k=None))
    assert found.device_bytes["frozen weights"] == 0
    assert found.device_bytes["trained weights"] == found.state.base_bytes == found.delta_bytes


def test_gradients_are_there_from_the_start_where_batches_are_summed(base):
    once, summed = (
        _estimator(base)(_run(base, method="full", select_top_k=None, gradient_accumulation_steps=n)) for n in (1, 2)
    )
    assert summed.device_bytes["gradients"] == summed.state.gradient_bytes
    assert summed.total_device_bytes > once.total_device_bytes


@pytest.mark.parametrize("store", ["host", "disk"])
def test_weights_in_a_store_are_counted_where_they_are(base, store):
    plain, stored = (_estimator(base)(_run(base, base_store=where)) for where in ("device", store))
    elsewhere = stored.host_bytes if store == "host" else stored.disk_bytes
    assert elsewhere == stored.state.stored_bytes > 0
    assert stored.device_bytes["frozen weights"] == plain.device_bytes["frozen weights"] - elsewhere
    fetched = stored.device_bytes["fetched weights"]
    # on a CPU weights in the host's memory are read where they are
    assert fetched == 0 if store == "host" else 0 < fetched < elsewhere
    apart = Estimator(model_config(str(base)), has_host=True)(_run(base, base_store=store))
    assert 0 < apart.device_bytes["fetched weights"] < elsewhere
    assert stored.trace == plain.trace


def test_rows_of_a_sparse_adapter_are_counted_where_they_are(base):
    found = _estimator(base)(_run(base, method="meft", select_top_k=None, meft_r=64))
    assert found.host_bytes == found.state.row_bytes + found.state.row_state_bytes
    counters = 4 * 64 * 3
    assert found.state.row_state_bytes == 2 * found.state.row_bytes + counters
    assert found.device_bytes["trained weights"] == found.state.trained_bytes - found.state.row_bytes


def test_rows_are_copied_to_a_device_that_has_memory_of_its_own(base):
    config, model = _run(base, method="meft", select_top_k=None, meft_r=64), tiny_model("deepseek_v2").config
    alone, apart = (Estimator(model, has_host=has_host)(config) for has_host in (False, True))
    # rows and moments that are gathered to be updated, of 64 rows of keys and values of 32 numbers
    gathered = 4 * 64 * (2 * 32) * 4
    assert alone.device_bytes["fetched weights"] == gathered
    assert apart.device_bytes["fetched weights"] == apart.state.row_bytes
    assert apart.host_bytes == alone.host_bytes + gathered


def test_what_cannot_be_traced_is_said_and_does_not_count_as_fitting(base):
    made = plan(_run(base, method="meft", select_top_k=None, meft_semantics="union"), device_memory="8GiB")
    (row,) = made.rows
    assert row.estimate is not None
    assert row.estimate.trace is None
    assert not row.fits
    text = _text(made)
    assert "not known" in text
    assert "meft_semantics: union cannot be traced" in text


def test_the_smallest_change_is_found(base):
    estimator, config = _estimator(base), _run(base, gradient_accumulation_steps=2)
    whole = estimator(config).total_device_bytes
    checkpointed = estimator(changed(config, {"gradient_checkpointing": True})).total_device_bytes
    assert checkpointed < whole
    found = smallest_change(config, Budget(checkpointed, None), estimator)
    assert found is not None
    assert found.keys == {"gradient_checkpointing": True}
    assert str(found) == "gradient_checkpointing: true"
    narrow = smallest_change(config, Budget(checkpointed - 1, None), estimator)
    assert narrow is not None
    assert narrow.keys == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    assert narrow.estimate.total_device_bytes < checkpointed


def test_of_several_changes_none_is_made_for_nothing(base):
    estimator, config = _estimator(base), _run(base, per_device_train_batch_size=1)
    both = {"gradient_checkpointing": True, "select_top_k": 1}
    room = estimator(changed(config, both)).total_device_bytes
    found = smallest_change(config, Budget(room, None), estimator)
    assert found is not None
    budget = Budget(room, None)
    for key in found.keys:
        fewer = {other: value for other, value in found.keys.items() if other != key}
        assert not budget.fits(estimator(changed(config, fewer))), key


@pytest.mark.parametrize(
    ("keys", "has_host", "expected"),
    [
        (
            {"select_top_k": 4, "max_length": 1024},
            True,
            "gradient_checkpointing: true | per_device_train_batch_size: 1, gradient_accumulation_steps: 4 | base_store: host | "
            "base_format: int8 | base_store: disk | base_format: nf4 | select_top_k: 2 | dtype: bfloat16 | max_length: 512 | "
            "max_length: 256",
        ),
        ({"select_top_k": None, "top_p": 0.4}, False, "top_p: null, select_top_fraction: 0.05"),
        ({"select_top_k": None, "select_top_fraction": 0.5}, False, "select_top_fraction: 0.25"),
        ({"select_top_k": None, "method": "meft", "meft_r": 64}, False, "meft_store: disk"),
        (
            {"select_top_k": None, "method": "meft", "meft_r": 64, "meft_store": "device"},
            True,
            "meft_store: host | meft_store: disk",
        ),
    ],
)
def test_what_may_be_changed_is_tried_in_this_order(base, keys, has_host, expected):
    config, shown = _run(base, **keys), []
    for change in fit._changes(config, has_host=has_host):
        differing = {key: value for key, value in change.items() if getattr(config, key) != value}
        shown.append(str(Change(differing, _estimator(base)(config))))
    assert expected in " | ".join(shown)


def test_what_is_moved_needs_no_clock(base):
    on_disk = plan(_run(base, base_store="disk"), device_memory="100MiB", host_memory="100KiB")
    assert on_disk.rows[0].time is None
    moved = on_disk.as_dict()["runs"][0]["moved_bytes"]
    assert moved == {"host": 0, "disk": 2 * on_disk.rows[0].estimate.state.stored_bytes}
    assert size(moved["disk"]) in _as_text(on_disk)
    untraced = _run(base, method="meft", select_top_k=None, meft_semantics="union", meft_store="disk")
    assert plan(untraced, device_memory="8GiB").as_dict()["runs"][0]["moved_bytes"] is None


def test_the_best_measured_is_recommended_and_who_is_level_with_it_named(base):
    made = plan(_run(base), methods=("lora", "esft", "meft"), device_memory="8GiB")
    assert made.measured is ON_MOE
    assert made.recommended.config.method == "esft"
    assert [row.config.method for row in made.level] == ["meft"]
    text = " ".join(_as_text(made).split())
    assert "esft fits, and of what fits had the highest score on the embedded MoE model's three tasks: 87%" in text
    assert "Not told apart from the best method there, the least memory first: meft (" in text
    elsewhere = plan(_run(base, select_top_k=None, method="lora", targets="attention"), device_memory="8GiB")
    assert elsewhere.recommended is None
    parted = plan(_run(base), methods=("esft", "meft"), device_memory="8GiB", world=World(2))
    assert [row.config.method for row in parted.level] == ["meft"]


@pytest.mark.parametrize(
    ("measured", "folder", "stands_for"),
    [
        (
            ON_MOE,
            "embedded",
            {"lora": "LoRA, all experts", "esft": "ESFT, token scores", "whole_parts": "shared experts alone"},
        ),
        (ON_DENSE, "smollm2", {}),
    ],
)
def test_what_was_measured_is_what_the_comparison_says(measured, folder, stands_for):
    path = Path(__file__).parents[2] / "benchmarks" / "comparisons" / folder / "comparison.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    num_tasks = len(found["rows"])
    assert measured.methods
    for method, one in measured.methods.items():
        labels = {row["label"] for rows in found["rows"].values() for row in rows if row["method"] == method}
        label = stands_for.get(method) or labels.pop()
        (over,) = [row for row in found["over_tasks"] if row["label"] == label]
        assert one.share == pytest.approx(over["gain_share"], abs=0.005), method
        assert one.is_level == (over["num_ties_with_best"] == num_tasks), method


def test_what_no_change_makes_fit_is_said(base):
    made = plan(_run(base), device_memory="10KiB")
    (row,) = made.rows
    assert (row.fits, row.change) == (False, None)
    assert made.recommended is None
    assert "esft lacks" in _text(made)
    assert "no change that is known here makes it fit" in _text(made)


def test_one_memory_holds_what_two_would(base):
    found = _estimator(base)(_run(base, base_store="host"))
    total = found.total_device_bytes + found.host_bytes
    assert Budget(total, None).fits(found)
    assert not Budget(total - 1, None).fits(found)
    assert Budget(found.total_device_bytes, found.host_bytes).fits(found)
    assert Budget(found.total_device_bytes, found.host_bytes - 1).lacking_bytes(found) == 1
    assert Budget(found.total_device_bytes, found.host_bytes, runtime_bytes=5).lacking_bytes(found) == 5


def test_a_method_that_a_setting_is_not_for_is_planned_without_it(base):
    made = plan(_run(base, base_store="disk", train_norms=True), methods=("esft", "full"), device_memory="8GiB")
    assert [row.config.base_store for row in made.rows] == ["disk", "device"]
    assert made.rows[1].fits


def test_a_method_that_the_model_cannot_have_is_told_beside_those_it_can(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    made = plan(_run(tmp_path, select_top_k=None), methods=("esft", "lora"), device_memory="8GiB")
    assert made.rows[0].estimate is None
    assert "esft: " in _text(made)
    assert made.recommended is made.rows[1]
    with pytest.raises(ModelError):
        plan(_run(tmp_path, select_top_k=None), device_memory="8GiB")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 << 30), ("8 GB", 8 * 10**9), ("1000000", 10**6), ("0.5 MiB", MIB // 2), ("3kb", 3000), ("7B", 7)],
)
def test_sizes_are_read(text, num_bytes):
    assert read_bytes(text, "device_memory") == num_bytes


@pytest.mark.parametrize("text", ["", "much", "8 GiBs", "-3GiB", "1e9", "GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"device_memory: got .*, expected a size such as 24GiB, 8GB or 500MiB"):
        read_bytes(text, "device_memory")


def test_nothing_is_no_memory():
    with pytest.raises(ConfigError, match="host_memory: got '0GiB', expected more than nothing"):
        read_bytes("0GiB", "host_memory")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ("esft", "lorra")},
            "method: got 'lorra', which is no method. Did you mean 'lora'?",
        ),
        ({"labelled_share": 0.0}, r"labelled_share: must be in \(0, 1\], got 0.0"),
        ({"device_memory": "lots"}, "device_memory: got 'lots'"),
    ],
)
def test_bad_input_is_refused(base, options, message):
    with pytest.raises(ConfigError, match=message):
        plan(_run(base), **options)


def test_the_command_prints_a_table_and_writes_json(base, tmp_path):
    options = ["--method", "esft,lora", "--device-memory", "8GiB", "--select-top-k", "2", "--max-length", "64"]
    done = CliRunner().invoke(app, ["plan", "--model", str(base), *options, "-o", str(tmp_path / "new" / "plan.json")])
    assert done.exit_code == 0, done.output
    assert "at the peak" in done.output
    assert "esft fits, and of what fits had" in done.output
    written = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert written["device_memory_bytes"] == 8 << 30
    assert [run["method"] for run in written["runs"]] == ["esft", "lora"]
    assert all(run["fits"] and run["forward_flops"] > 0 for run in written["runs"])
    assert sum(written["runs"][0]["device_bytes"].values()) == written["runs"][0]["total_device_bytes"]


def test_a_runs_file_is_planned_as_it_is(base, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model: {base}\ndataset: nowhere.jsonl\noutput_dir: runs/x\nmethod: expert_lora\nselect_top_k: 1\nmax_length: 64\n"
    )
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "run.yaml"), "--device-memory", "8GiB"])
    assert done.exit_code == 0, done.output
    assert "expert_lora fits" in done.output


def test_the_kv_cache_is_said_once(base, tmp_path):
    made = plan(_run(base), methods=("esft", "lora"), device_memory="8GiB")
    config = tiny_model("deepseek_v2").config
    assert made.kv_cache == kv_cache(config, dtype=torch.float32)
    made.save(tmp_path / "plan.json")
    token_bytes = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    assert json.loads((tmp_path / "plan.json").read_text())["kv_cache"] == {
        "token_bytes": token_bytes,
        "long_token_bytes": token_bytes,
        "bytes_at_32768_tokens": 32_768 * token_bytes,
    }
    assert _text(made).count("the KV cache (MLA)") == 1
    halves = plan(_run(base, dtype="bfloat16"), device_memory="8GiB")
    assert halves.kv_cache is not None
    assert halves.kv_cache.token_bytes == token_bytes // 2


def test_a_model_whose_cache_is_not_known_has_none(base, monkeypatch):
    def refuse(*_args, **_options):
        raise UnsupportedModelError("no keys")

    monkeypatch.setattr("metier.planning.plan.kv_cache", refuse)
    made = plan(_run(base), device_memory="8GiB")
    assert made.as_dict()["kv_cache"] is None
    assert "KV cache" not in _text(made)


def test_memory_that_is_not_given_is_this_machines(base, monkeypatch):
    monkeypatch.setattr(budget, "memory_limit_bytes", lambda: 123 * MIB)
    monkeypatch.setattr(budget, "held_bytes", lambda: 3 * MIB)
    monkeypatch.setattr(budget.torch.cuda, "is_available", lambda: False)
    assert plan(_run(base)).budget == Budget(123 * MIB, None, 3 * MIB + budget.WORKSPACE_BYTES)
    assert plan(_run(base), device_memory="1GiB", host_memory="2GiB").budget == Budget(1 << 30, 2 << 30, 0)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0"), (999, "999 B"), (1000, "0.977 KiB"), (3 << 30, "3 GiB"), (5 << 40, "5 TiB")]
)
def test_sizes_are_shown(num_bytes, text):
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12"), (1500, "1.5 k"), (19_660_800, "19.7 M"), (671_026_404_352, "671 B")]
)
def test_counts_are_shown(number, text):
    assert count(number) == text


def _text(made: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(made)
    return console.export_text()


def _as_text(made: Plan) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(made)
    return console.file.getvalue()


def test_the_length_of_a_run_follows_from_its_records(base):
    keys = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    made = plan(_run(base, **keys), methods=["esft"], num_records=100)
    run = made.as_dict()["runs"][0]
    # batches of 4, two a step
    assert run["seconds_in_all"] == 2 * 13 * run["step_seconds"]
    mixed = plan(_run(base, **keys, general_dataset="-", general_ratio=0.5), methods=["esft"], num_records=100)
    assert mixed.seconds_in_all(mixed.rows[0]) == 2 * 19 * mixed.rows[0].time.seconds
    with pytest.raises(ConfigError, match="records: must be at least 1, got 0"):
        plan(_run(base), num_records=0)


def test_seconds_of_a_step_and_of_all_and_what_they_go_to_are_shown(base):
    made = plan(_run(base, max_steps=600), methods=["esft", "full"])
    assert all(row.time is not None and row.time.seconds > 0 for row in made.rows)
    run = made.as_dict()["runs"][0]
    assert run["step_seconds"] == made.rows[0].time.seconds
    assert run["seconds_in_all"] == 600 * run["step_seconds"]
    assert sum(run["seconds_by_part"].values()) == pytest.approx(run["step_seconds"])
    shown = _as_text(made)
    assert "│ step" in shown
    assert "│ in all" in shown
    assert "What most of a step's time goes to: esft" in shown
    assert made.rows[0].time.bottleneck in shown


def test_another_device_has_its_own_seconds_and_memory(base):
    made = plan(_run(base), device="rtx-4090")
    assert made.budget.device_bytes == 24_564 * MIB
    assert made.as_dict()["device"] == "rtx-4090"
    assert "nothing was measured on a GPU" in " ".join(_as_text(made).split())
    assert made.budget.host_bytes is not None
    assert made.budget.runtime_bytes == 0
    slower = plan(_run(base), device="t4")
    assert slower.rows[0].time.parts["products"] > made.rows[0].time.parts["products"] > 0
    assert plan(_run(base), device="t4", device_memory="1GiB").budget.device_bytes == 1 << 30
    with pytest.raises(ConfigError, match="device: got 'voodoo'"):
        plan(_run(base), device="voodoo")


def test_a_machine_that_is_busy_is_told_of(base, monkeypatch, tmp_path):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path))
    monkeypatch.setattr("metier.planning.machine.reference", lambda: (1.0, 0.2))
    made = plan(_run(base))
    assert "Others took this machine's cores" in _as_text(made)
    assert made.as_dict()["machine_was_busy"]
    monkeypatch.setattr("metier.planning.machine.reference", lambda: (1.0, 1.0))
    assert "Others took" not in _as_text(plan(_run(base)))


def test_without_a_name_nothing_is_said_of_a_devices_seconds(base):
    made = plan(_run(base), device_memory="24GiB", host_memory="64GiB")
    assert made.rows[0].time is None
    assert "Seconds are not known: what computes is not this machine's CPU" in _as_text(made)
    assert made.as_dict()["not_timed"]
    assert "step_seconds" not in made.as_dict()["runs"][0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.01234, "0.0123 s"), (59.4, "59.4 s"), (90, "1.5 min"), (3599, "1 h 00 min"), (7260, "2 h 01 min")],
)
def test_times_are_short(seconds, shown):
    assert duration(seconds) == shown


def test_calibrating_learns_from_runs_and_plans_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    done = CliRunner().invoke(app, ["plan", "--calibrate", "--runs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "measured anew" in done.output
    assert "no run of this machine says both" in " ".join(done.output.split())
    predicted = {"step_seconds": 2.7, "operation_seconds": 2.0, "in_a_step": 1.1, "peak_memory_bytes": 100 * MIB}
    predicted |= {"workspace_bytes": 0, "machine": fingerprint(), "bottleneck": "products"}
    written = {"predicted": predicted, "measured": {"step_seconds": 3.5, "peak_memory_bytes": 133 * MIB}}
    (tmp_path / "plan.json").write_text(json.dumps(written))
    done = CliRunner().invoke(app, ["plan", "--calibrate", "--runs", str(tmp_path)])
    assert "operations take 1.50 times as long" in " ".join(done.output.split())
    assert budget.workspace_bytes() == 33 * MIB
    clock = clock_here(RunConfig(model="-", dataset="-", output_dir=str(tmp_path)))
    assert clock.in_a_step == pytest.approx(1.5)


def test_calibrating_alone_with_what_only_a_plan_has_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("metier.planning.machine.reference", lambda: (1.0, 1.0))
    plan(_run(base))
    kept = {path: path.read_text() for path in (tmp_path / "cache").iterdir()}
    done = CliRunner().invoke(app, ["plan", "--calibrate", "--runs", str(tmp_path), "--method", "all"])
    assert done.exit_code != 0
    # and loses nothing that was measured
    assert {path: path.read_text() for path in (tmp_path / "cache").iterdir()} == kept
    assert "plans nothing" in str(done.exception)


def test_calibrating_before_a_plan_measures_anew(base, tmp_path, monkeypatch):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    seconds = itertools.count(1.0)
    monkeypatch.setattr("metier.planning.machine.reference", lambda: (next(seconds), 1.0))
    plan(_run(base))
    (kept,) = (tmp_path / "cache").iterdir()
    old = json.loads(kept.read_text())
    options = ["--model", str(base), "--calibrate", "--runs", str(tmp_path), "--max-length", "64"]
    done = CliRunner().invoke(app, ["plan", *options])
    assert done.exit_code == 0, done.output
    assert "at the peak" in done.output
    new = json.loads(kept.read_text())
    assert new["multiples"].keys() & old["multiples"].keys()
    assert new["reference_seconds"] != old["reference_seconds"]


def test_a_delta_that_merges_costs_nothing_at_inference_and_a_sparse_adapter_its_rows(base):
    found = _estimator(base)
    assert found(_run(base)).added_at_inference == 0
    sparse = found(_run(base, method="meft", meft_r=64, select_top_k=None))
    without = found(_run(base, method="full", select_top_k=None))
    adapter = sparse.trace.flops("forward") - without.trace.flops("forward")
    # rows that fire are not multiplied one by one, but with all others of their Key-Expert
    assert 0.3 < sparse.added_at_inference / (adapter / without.trace.flops("forward")) < 1.5


def test_what_fits_beside_each_other_when_serving_is_said(base):
    shown = " ".join(_as_text(plan(_run(base), device="t4")).split())
    assert "Serving on it, the base takes " in shown
    cache = kv_cache(tiny_model("deepseek_v2").config, dtype=torch.float32)
    state = _estimator(base)(_run(base)).state
    fitting = cache.num_sequences_that_fit(15 << 30, 32_768, weights_bytes=state.base_bytes)
    assert f"leaves room for {fitting:,} such sequences, or for one and " in shown


@pytest.mark.parametrize(
    ("store", "has_host", "kept"),
    [("device", False, 1), ("host", False, 1), ("disk", False, 0), ("host", True, 1), ("disk", True, 1)],
)
def test_the_room_of_rows_gradients_stays_from_step_to_step(base, store, has_host, kept):
    found = Estimator(tiny_model("deepseek_v2").config, has_host=has_host)
    config = _run(base, method="meft", meft_r=64, meft_store=store, select_top_k=None)
    one = found(config)
    of_rows = kept * one.state.row_bytes
    # what else there is of gradients is that of the routers, of layers that the backward pass has behind it
    assert of_rows <= one.device_bytes["gradients"] <= of_rows + one.state.gradient_bytes - one.state.row_bytes
    often = found(changed(config, {"gradient_accumulation_steps": 2}))
    assert often.device_bytes["gradients"] == often.state.gradient_bytes - (1 - kept) * one.state.row_bytes


def test_what_only_another_method_has_is_left_out_of_its_row(base):
    of_lora = {"lora_r": 4, "targets": "attention", "method_options": {"use_rslora": True}}
    run = _run(base, method="lora", select_top_k=None, **of_lora)
    made = plan(run, methods=("lora", "full", "esft"), device_memory="8GiB")
    assert [row.verdict for row in made.rows] == ["yes"] * 3, [row.why_not for row in made.rows]
    assert [row.config.method_options for row in made.rows] == [{"use_rslora": True}, {}, {}]
    assert [row.config.lora_r for row in made.rows] == [4, 8, 8]


def _planned(base: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["plan", "--model", str(base), "--max-length", "64", "--dtype", "float32", *options])
    text = done.output if done.exception is None else f"{done.output}{done.exception}"
    return " ".join(text.replace("│", " ").split())


def test_a_key_goes_to_those_of_several_methods_that_have_it(base, tmp_path):
    options = ("--method", "lora,meft,full", "--meft-r", "64", "--lora-r", "4", "--device-memory", "8GiB")
    _planned(base, *options, "--targets", "attention", "-o", str(tmp_path / "plan.json"))
    runs = {run["method"]: run for run in json.loads((tmp_path / "plan.json").read_text())["runs"]}
    one = {
        "lora": _run(base, method="lora", select_top_k=None, lora_r=4, targets="attention"),
        "meft": _run(base, method="meft", select_top_k=None, meft_r=64),
    }
    for name, config in one.items():
        assert runs[name]["num_trained_parameters"] == _estimator(base)(config).state.num_trained


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "lora,full", "--meft-r", "64"), "--meft_r is for none of the methods lora, full"),
        (("--method", "lora,full", "--lora-rr", "64"), "--lora_rr is unknown to the methods lora, full. Did you mean 'lora_r'?"),
        (("--method", "lora,nome"), "nome"),
        (("--method", "lora", "--vary", "lora_r"), "vary: got 'lora_r', expected a key with its values"),
        (("--method", "lora", "--vary", "lora_r=4,x"), "lora_r must be a whole number, got 'x'"),
        (("--host-memory", "8GiB"), "host_memory: is beside a device's, and there is none here"),
        (("--runs", "elsewhere"), "runs: are learned from with --calibrate"),
        (("-o", "."), "output: got '.', which cannot be written"),
        (("-o", "/dev/null/plan.json"), "which cannot be written"),
        (("--fsdp",), "fsdp: there is one process"),
        (("--method", "mezo", "--mezo-directions", "0"), "mezo_directions: must be at least 1, got 0"),
        (("--method", "prompt", "--padding-free"), "padding_free: records that share a row have one beginning"),
        (("--global-batch-size", "6", "--per-device-train-batch-size", "4"), "expected a multiple of 4"),
    ],
)  # fmt: skip
def test_what_a_plan_cannot_have_is_refused(base, options, told):
    assert told in _planned(base, *options)


def test_one_method_is_planned_with_several_settings(base, tmp_path):
    options = ("--method", "lora,full", "--vary", "lora_r=4,8", "--vary", "max_length=32,64", "--device-memory", "8GiB")
    _planned(base, *options, "-o", str(tmp_path / "plan.json"), "--chart", str(tmp_path / "plan.html"))
    runs = json.loads((tmp_path / "plan.json").read_text())["runs"]
    settings = [(run["method"], run["setting"]) for run in runs]
    assert settings == [
        ("lora", "lora_r 4 max_length 32"), ("lora", "lora_r 4 max_length 64"),
        ("lora", "lora_r 8 max_length 32"), ("lora", "lora_r 8 max_length 64"),
        ("full", "max_length 32"), ("full", "max_length 64"),
    ]  # fmt: skip
    trained = [run["num_trained_parameters"] for run in runs]
    assert trained[0] == trained[1] == trained[2] / 2
    assert "lora lora_r 4 max_length 32" in (tmp_path / "plan.html").read_text()


def test_without_bitsandbytes_other_changes_are_looked_for(base, monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else plain(name))
    config = _run(base)
    # what comes after nf4 among the changes
    least = _estimator(base)(changed(config, {"select_top_k": 1})).total_bytes
    singles = [{"base_format": "nf4"}, {"select_top_k": 1}]
    monkeypatch.setattr(fit, "_changes", lambda *_, **__: iter(singles))
    change = smallest_change(config, Budget(least, None), _estimator(base))
    assert change is not None
    assert change.keys == {"select_top_k": 1}
    assert plan(config, device_memory="10KiB").rows[0].change is None


def test_lora_on_experts_is_not_said_to_fit_with_them_in_a_store(base):
    with pytest.raises(ConfigError, match="lies in a store"):
        plan(_run(base, method="lora", select_top_k=None, targets="routed", base_format="int8"), device_memory="8GiB")
    alone = _run(base, method="lora", select_top_k=None, targets="routed")
    lacking = _estimator(base)(alone).total_bytes - 1000
    change = smallest_change(alone, Budget(lacking, None), _estimator(base))
    assert change is not None
    assert not {"base_store", "base_format"} & set(change.keys)


def test_a_global_batch_is_planned_as_it_is_trained(base):
    parted, summed = (
        plan(_run(base, **keys), device_memory="8GiB", device="h100").rows[0]
        for keys in ({"global_batch_size": 32}, {"gradient_accumulation_steps": 8})
    )
    assert parted.config.gradient_accumulation_steps == 8
    assert parted.estimate.device_bytes == summed.estimate.device_bytes
    assert parted.time.seconds == summed.time.seconds


def test_rows_that_a_device_keeps_take_their_moments_too_and_are_not_moved(base):
    model = tiny_model("deepseek_v2").config
    config = _run(base, method="meft", select_top_k=None, meft_r=64)
    state = Estimator(model, has_host=True)(config).state
    in_all = state.row_bytes + state.row_state_bytes
    found = {}
    for name, cached in (("none", 0), ("half", in_all // 2), ("all", 2 * in_all)):
        one = Estimator(model, has_host=True)(dataclasses.replace(config, meft_cache_bytes=cached))
        found[name] = (one.device_bytes["fetched weights"], moved_bytes(one, has_host=True)["host"])
    gathered = Estimator(model)(config).device_bytes["fetched weights"]
    moved = found["none"][1]
    assert 0 < moved <= state.row_bytes + state.row_gradient_bytes
    assert found["none"][0] == state.row_bytes
    assert found["half"][0] == pytest.approx((state.row_bytes + in_all) / 2 + gathered, abs=2)
    assert found["half"][1] == pytest.approx(moved / 2, abs=2)
    assert found["all"] == (in_all + gathered, 0)


@pytest.mark.parametrize(
    ("vocab_size", "share", "place"),
    [(4096, 1.0, "the output layer and the loss"), (64, 0.01, "backward through layer")],
)
def test_where_the_peak_is_is_said(vocab_size, share, place):
    base = tiny_model("llama", num_hidden_layers=3, vocab_size=vocab_size).config
    keys = {"method": "lora", "dtype": "float32", "gradient_checkpointing": share < 1, "max_length": 512}
    found = Estimator(base, labelled_share=share)(RunConfig(model="-", dataset="-", output_dir="-", **keys))
    assert table._place_of_peak(found.trace).startswith(place)


def test_what_the_base_takes_is_said_in_its_own_dtype(base):
    console = Console(width=300, file=io.StringIO())
    console.print(plan(_run(base, dtype="bfloat16"), methods=("full", "esft"), device_memory="8GiB"))
    num_bytes = 2 * sum(p.numel() for p in tiny_model("deepseek_v2").parameters())
    assert f"the base takes {size(num_bytes)}" in console.file.getvalue()


def _file(folder: Path, **keys: object) -> str:
    (folder / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return str(folder / "run.yaml")


@pytest.mark.parametrize("keys", [{"lerning_rate": 1e-4}, {"method": "nome"}, {"method": "lora", "targets": "norms"}])
def test_a_mistake_in_a_runs_file_is_refused_whatever_methods_are_planned(base, tmp_path, keys):
    file = _file(tmp_path, model=base, **keys)
    done = CliRunner().invoke(app, ["plan", file, "--method", "lora,full", "--device-memory", "8GiB"])
    assert isinstance(done.exception, ConfigError)


def test_a_format_that_is_its_methods_own_is_not_that_of_others(base, tmp_path):
    file = _file(tmp_path, model=base, method="qlora", base_format="nf4", targets="attention", max_length=64)
    output = tmp_path / "plan.json"
    CliRunner().invoke(app, ["plan", file, "--method", "lora,qlora", "--device-memory", "8GiB", "-o", str(output)])
    runs = {run["method"]: run["base_format"] for run in json.loads(output.read_text())["runs"]}
    assert runs == {"lora": None, "qlora": "nf4"}


def test_runs_of_several_models_are_refused(base):
    with pytest.raises(ConfigError, match="several models"):
        plan([_run(base), _run(base, revision="main")])


def test_what_several_processes_refuse_cannot_be(base):
    made = plan(_run(base, method="adalora", select_top_k=None), device_memory="8GiB", world=World(2, 8, ()))
    assert {row.verdict for row in made.rows} == {"no"}


def test_settings_are_those_that_are_given(base):
    runs = [_run(base, global_batch_size=size) for size in (8, 16)]
    assert [row.setting for row in plan(runs, device_memory="8GiB").rows] == [
        "global_batch_size 8",
        "global_batch_size 16",
    ]


@pytest.mark.parametrize(
    ("device", "host", "fits"), [(100, 1000, True), (95, 900, True), (89, 1000, False), (100, 800, False)]
)
def test_each_memory_may_be_foreseen_too_large_by_its_own_share(base, device, host, fits):
    found = dataclasses.replace(_estimator(base)(_run(base)), device_bytes={"frozen weights": 100}, host_bytes=1000)
    assert Budget(device, host).fits(found, may_be_wrong=0.1) == fits
    assert Budget(1100, None).fits(found)
    assert not Budget(1099, None).fits(found)


def test_a_change_of_a_global_batch_leaves_its_parts_to_it(base):
    config = _run(base, global_batch_size=32, per_device_train_batch_size=8)
    found = plan(config, device_memory="8GiB").rows[0].estimate
    change = (
        plan(
            config, device_memory=f"{found.total_bytes + budget.workspace_bytes()}B", device="h100", host_memory="8GiB"
        )
        .rows[0]
        .change
    )
    if change is None:
        lacking = found.total_device_bytes - 1000
        change = plan(config, device_memory=f"{lacking}B", host_memory="8GiB").rows[0].change
    assert change is not None
    assert "gradient_accumulation_steps" not in change.keys
    dataclasses.replace(config, **change.keys)
