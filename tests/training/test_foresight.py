"""A run plans before it starts, refuses what cannot fit, and says how wrong the plan was."""

from __future__ import annotations

import dataclasses
import json
import re
from io import StringIO
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
import torch
from rich.console import Console

from metier.config import RunConfig
from metier.data.encode import IGNORED, Encoded
from metier.distributed.ranks import Ranks
from metier.errors import RunError, UnsupportedModelError
from metier.memory.process_memory import ProcessMemory
from metier.planning import estimate
from metier.planning.clock import PARTS
from metier.planning.fit import Budget, changed
from metier.planning.step import Batch
from metier.training import foresight as module
from metier.training.foresight import Foresight, largest_batch
from metier.training.run import train
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("deepseek_v2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(base, tmp_path) -> RunConfig:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a reply."}]
    lines = [json.dumps({"messages": turns}) + "\n" for _ in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    return RunConfig(
        model=str(base),
        dataset=str(tmp_path / "data.jsonl"),
        output_dir=str(tmp_path / "run"),
        select_top_k=2,
        profile_tokens=64,
        max_steps=2,
        learning_rate=1e-3,
    )


def _limited(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(module, "machine_budget", lambda **_: Budget(num_bytes, None, 0))


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_was_foreseen_stands_beside_what_was_measured(config, monkeypatch, is_kept: bool):
    monkeypatch.setattr(module, "is_left_alone", lambda: is_kept)
    printed = Console(file=StringIO(), width=200)
    train(config, console=printed)
    written = json.loads((Path(config.output_dir) / "plan.json").read_text())
    predicted, measured = written["predicted"], written["measured"]
    assert predicted["activation_bytes"] > 0
    assert min(predicted["forward_flops"], predicted["backward_flops"]) > 0
    # a model of a few hundred kilobytes is nothing beside the process
    assert predicted["peak_memory_bytes"] == pytest.approx(measured["peak_memory_bytes"], rel=0.5)
    assert "foreseen (" in printed.file.getvalue()


def test_a_run_whose_step_cannot_be_traced_goes_on_and_says_why_nothing_was_foreseen(config, monkeypatch):
    def refuse(*_args, **_options):
        raise UnsupportedModelError("Odd: it has three stacks of layers.")

    monkeypatch.setattr(estimate, "trace_step", refuse)
    printed = Console(file=StringIO(), width=200)
    train(config, console=printed)
    predicted = json.loads((Path(config.output_dir) / "plan.json").read_text())["predicted"]
    assert predicted["not_traced"] == "Odd: it has three stacks of layers."
    assert "peak_memory_bytes" not in predicted
    assert "was not foreseen: Odd: it has three" in printed.file.getvalue()


def test_weights_that_do_not_fit_are_refused_before_anything_is_loaded(config, monkeypatch):
    _limited(monkeypatch, 100_000)
    monkeypatch.setattr("metier.training.run.load_base", lambda config: pytest.fail("was loaded"))
    with pytest.raises(RunError, match=r"the run needs at least .* more than there is: .* of frozen weights"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_a_share_of_the_weights_that_does_not_fit_is_refused_before_anything_is_loaded(config, monkeypatch):
    base, settings = tiny_model("deepseek_v2").config, {"force": False, "is_sharded": True}
    whole = changed(config, {"method": "full", "select_top_k": None})
    needed = Foresight(whole, base, force=False)._estimator.without_activations(whole).total_device_bytes
    _limited(monkeypatch, needed * 3 // 4)
    with pytest.raises(RunError, match=r"needs at least .* more than there is"):
        Foresight(whole, base, force=False).before_loading()
    Foresight(whole, base, ranks=Ranks(size=8), **settings).before_loading()
    _limited(monkeypatch, needed // 3)
    with pytest.raises(RunError, match=r"needs at least .* of gathered weights(.|\n)*--force"):
        Foresight(whole, base, ranks=Ranks(size=8), **settings).before_loading()


def test_processes_of_one_machine_share_its_memory(config, monkeypatch):
    monkeypatch.setattr("metier.planning.budget.memory_limit_bytes", lambda: 12 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = tiny_model("deepseek_v2").config
    for local_size, share in ((1, 12 << 30), (3, 4 << 30)):
        found = Foresight(config, base, force=False, ranks=Ranks(size=6, local_size=local_size))
        assert found.budget.device_bytes == share


def test_activations_that_do_not_fit_are_refused_before_training(config, monkeypatch):
    state = Foresight(config, tiny_model("deepseek_v2").config, force=False)._estimator.without_activations(config)
    _limited(monkeypatch, state.total_device_bytes + 1000)
    with pytest.raises(RunError, match=r"of activations(?s:.*)Or run it all the same with --force"):
        train(config)
    assert not (Path(config.output_dir) / "adapter").exists()


def test_what_may_fit_after_all_is_not_refused(config, monkeypatch):
    found = Foresight(config, tiny_model("deepseek_v2").config, force=False)._estimator(config)
    _limited(monkeypatch, int(0.95 * found.total_device_bytes))
    kept = Foresight(config, tiny_model("deepseek_v2").config, force=False)
    kept._check(found, may_be_wrong=module.OVER_PREDICTED)
    with pytest.raises(RunError, match="more than there is"):
        kept._check(found)


def test_by_force_it_runs_all_the_same(config, monkeypatch):
    _limited(monkeypatch, 100_000)
    train(config, force=True, console=Console(file=StringIO()))
    assert (Path(config.output_dir) / "adapter").exists()


def test_a_run_is_not_refused_on_a_guess_of_its_experts(base):
    """How many experts top_p takes is known after profiling alone."""
    guessed = RunConfig(model=str(base), dataset="-", output_dir="-", top_p=0.9)
    assert module._at_least(guessed).select_top_k == 1
    kept = RunConfig(model=str(base), dataset="-", output_dir="-", select_top_fraction=0.5)
    assert module._at_least(kept) is kept


@pytest.mark.parametrize(
    ("padding_free", "rows", "batch"),
    [
        (False, 2, Batch(2, 9, 2 / 9)),
        (False, 8, Batch(3, 9, 2 / 9)),
        # three records are all there are: the longest, and two more of six tokens each, which fill two rows of nine
        (True, 6, Batch(3, 9, 1 / 3)),
        (True, 1, Batch(1, 9, 1 / 3)),
    ],
)
def test_the_largest_batch_is_as_long_as_the_longest_record(padding_free, rows, batch):
    config = RunConfig(
        model="m", dataset="d", output_dir="o", padding_free=padding_free, per_device_train_batch_size=rows
    )
    items = [
        Encoded(input_ids=[7] * n, labels=[IGNORED] * (n - n // 3) + [7] * (n // 3), origin="t") for n in (3, 9, 6)
    ]
    found = largest_batch(items, config)
    assert (found.num_rows, found.num_tokens) == (batch.num_rows, batch.num_tokens)
    assert found.labelled_share == pytest.approx(batch.labelled_share)


def test_the_seconds_of_a_step_stand_beside_what_it_took(config):
    printed = Console(file=StringIO(), width=200)
    train(config, console=printed)
    folder = Path(config.output_dir)
    written = json.loads((folder / "plan.json").read_text())
    predicted, measured = written["predicted"], written["measured"]
    assert 0 < predicted["operation_seconds"] < predicted["step_seconds"] < 10
    assert predicted["train_seconds"] == pytest.approx(2 * predicted["step_seconds"])
    assert 0 < measured["step_seconds"] < measured["train_seconds"]
    assert predicted["bottleneck"] in PARTS
    assert "s foreseen (" in printed.file.getvalue().partition("A step took")[2]
    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line][-1:]
    assert line["foreseen_step_seconds"] == predicted["step_seconds"]
    assert line["foreseen_peak_memory_bytes"] == predicted["peak_memory_bytes"]
    assert line["step_seconds"] > 0
    report = (folder / "report.html").read_text()
    assert "Foreseen" in report
    assert f"on {predicted['bottleneck']}." in report


def test_where_too_little_memory_is_free_nothing_is_measured(config, monkeypatch):
    monkeypatch.setattr(module, "memory_limit_bytes", lambda: 1 << 30)
    monkeypatch.setattr(module, "held_bytes", lambda: 800 << 20)
    monkeypatch.setattr(module, "clock_here", lambda _: pytest.fail("was measured"))
    printed = Console(file=StringIO(), width=200)
    train(config, console=printed)
    predicted = json.loads((Path(config.output_dir) / "plan.json").read_text())["predicted"]
    assert "512 MiB of memory are free" in predicted["not_timed"]
    assert "what it would take was not foreseen: less than 512 MiB" in printed.file.getvalue()


def test_what_was_measured_with_is_no_part_of_the_peak(config, monkeypatch, tmp_path):
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    kept = Foresight(config, tiny_model("deepseek_v2").config, force=False)
    items = [Encoded(input_ids=[7] * 9, labels=[7] * 9, origin="t")] * 4
    before = module.peak_memory_bytes()
    times = kept._times(config, items, 0)
    assert times["train_seconds"] == pytest.approx(2 * times["step_seconds"])
    left = kept._times(config, items, 1)
    assert left["train_seconds"] == left["step_seconds"]
    # a hundred megabytes of weights and rows are measured with
    assert kept.peak_memory_bytes() < before + (64 << 20)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("padding_free", [False, True])
def test_the_mean_batch_is_that_of_all_that_can_be_drawn(rows, padding_free):
    lengths = [3, 9, 6, 6, 1]
    items = [Encoded(input_ids=[7] * n, labels=[7] * n, origin="t") for n in lengths]
    config = RunConfig(
        model="m", dataset="d", output_dir="o", padding_free=padding_free, per_device_train_batch_size=rows
    )
    drawn = list(combinations(lengths, min(rows, len(lengths))))
    tokens = [sum(batch) if padding_free else len(batch) * max(batch) for batch in drawn]
    assert module.mean_tokens(items, config) == pytest.approx(fmean(tokens))


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 2}, 4),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 2}, 1),
        ({"num_train_epochs": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 6),
        ({"num_train_epochs": 0.5, "per_device_train_batch_size": 1}, 4),
    ],
)
def test_steps_are_counted_as_the_trainer_does(config, keys, steps):
    config = dataclasses.replace(config, **{"max_steps": None, "per_device_train_batch_size": 4, **keys})
    assert module.num_steps(8, config) == steps
    train(config, console=Console(file=StringIO()))
    state = [json.loads(line)["step"] for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert max(state) == steps


@pytest.mark.skipif(not ProcessMemory.is_known(), reason="the host does not say what a process holds")
def test_what_is_held_for_records_by_now_is_foreseen(config):
    items = [Encoded(input_ids=[7] * 9, labels=[7] * 9, origin="t")] * 4

    def foreseen() -> float:
        found = kept.before_training(items, None)
        return found["peak_memory_bytes"] - found["kept_freed_bytes"]

    kept = Foresight(config, tiny_model("deepseek_v2").config, force=True)
    foreseen()  # what a first trace takes is there
    before = foreseen()
    records = torch.ones(300 << 18)
    assert foreseen() - before == pytest.approx(records.nbytes, rel=0.05)


@pytest.mark.parametrize("is_kept", [True, False])
def test_where_glibc_keeps_what_is_freed_that_is_foreseen_too(config, monkeypatch, is_kept: bool) -> None:
    monkeypatch.setattr(module, "is_left_alone", lambda: is_kept)
    items = [Encoded(input_ids=[5, 6, 7], labels=[-100, 6, 7], origin="test")] * 4
    kept = Foresight(config, tiny_model("deepseek_v2").config, force=True)
    found = kept.before_training(items, None)
    rest = found["peak_memory_bytes"] - found["kept_freed_bytes"]
    assert found["kept_freed_bytes"] == (int(module.KEPT * rest) if is_kept else 0)


def test_what_may_not_fit_is_told_before_the_first_step(config, monkeypatch) -> None:
    found = Foresight(config, tiny_model("deepseek_v2").config, force=False)._estimator(config)
    monkeypatch.setattr(module, "largest_batch", lambda items, config: None)  # a full one
    _limited(monkeypatch, int(0.95 * found.total_device_bytes))
    console = Console(file=StringIO(), width=500)
    train(config, console=console)
    told = console.file.getvalue()
    assert "Foreseen: " in told
    assert told.index("Foreseen: ") < told.index("Memory may not be enough: ")
    assert re.search(r"[1-9]\S* \S+ are lacking of \S+ \S+, which may be foreseen up to 9% too large", told)
    roomy = Console(file=StringIO(), width=500)
    monkeypatch.undo()
    train(dataclasses.replace(config, output_dir=f"{config.output_dir}-roomy"), console=roomy)
    assert "Memory may not" not in roomy.file.getvalue()


@pytest.mark.parametrize(
    ("keys", "free", "parts"),
    [
        ({}, 1 << 30, None),
        ({}, 1000, "for its delta.$"),
        ({"save_steps": 1}, 50_000, "for its delta, .* for a checkpoint.$"),
        (
            {"method": "meft", "meft_r": 64, "meft_store": "disk", "select_top_k": None},
            100_000,
            "sparse adapter's rows",
        ),
    ],
)
def test_a_disk_without_room_is_told_before_anything_is_loaded(config, monkeypatch, keys, free, parts):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    changed_config = dataclasses.replace(config, **keys)
    foreseen = Foresight(changed_config, tiny_model("deepseek_v2").config, force=False)
    if parts is None:
        foreseen.before_loading()
        return
    with pytest.raises(RunError, match=f"output_dir: .*free, expected at least .*{parts}".replace("$", "\n")):
        foreseen.before_loading()
    Foresight(changed_config, tiny_model("deepseek_v2").config, force=True).before_loading()


def test_what_does_not_fit_is_listed_with_what_lies_on_the_host(config, monkeypatch):
    _limited(monkeypatch, 100_000)
    rows = dataclasses.replace(config, method="meft", meft_r=64, select_top_k=None)
    with pytest.raises(RunError) as told:
        Foresight(rows, tiny_model("deepseek_v2").config, force=False).before_loading()
    listed = re.findall(r"([\d.]+) (B|KiB|MiB) of ", str(told.value).split("more than there is:")[1].split("\n")[0])
    units = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}
    needed, unit = re.search(r"needs at least ([\d.]+) (KiB|MiB)", str(told.value)).groups()
    total = sum(float(number) * units[unit] for number, unit in listed)
    assert total == pytest.approx(float(needed) * units[unit], rel=0.02)
    assert "of rows and stored weights on the host" in str(told.value)


@pytest.mark.parametrize(
    ("lengths", "padding_free", "rows"), [((5, 5, 5), False, "whole"), ((5, 5, 4), False, "padded"),
                                          ((5, 5, 5), True, "whole"), ((5, 4, 4), True, "shared")],
)  # fmt: skip
def test_batches_of_unlike_records_have_a_mask(config, lengths, padding_free, rows):
    items = [Encoded(input_ids=[1] * n, labels=[IGNORED] + [1] * (n - 1), origin="") for n in lengths]
    found = dataclasses.replace(config, padding_free=padding_free)
    assert {largest_batch(items, found).rows, module.mean_batch(items, found).rows} == {rows}


def test_what_a_killed_run_has_left_on_the_disk_is_room(config, monkeypatch):
    rows = {"method": "meft", "meft_r": 64, "meft_store": "disk", "select_top_k": None}
    on_disk = dataclasses.replace(config, **rows)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    with pytest.raises(RunError, match="sparse adapter's rows"):
        Foresight(on_disk, tiny_model("deepseek_v2").config, force=False).before_loading()
    left = Path(config.output_dir) / "rows" / "default"
    left.mkdir(parents=True)
    (left / "layer.rows").write_bytes(b"1" * 1_000_000)
    Foresight(on_disk, tiny_model("deepseek_v2").config, force=False).before_loading()
