"""Every method of the catalogue can be planned: its step, traced without numbers, takes what the trainer's step takes."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console
from transformers import Trainer
from typer.testing import CliRunner

from measured_step import measured
from metier.catalogue.method import DENSE, MOE
from metier.catalogue.tree import METHODS
from metier.cli import app
from metier.config import RunConfig
from metier.errors import ConfigError
from metier.methods.from_catalogue import NeedsWeightsError
from metier.methods.wrap import wrap
from metier.planning.clock import DeviceClock
from metier.planning.devices import device_of
from metier.planning.estimate import Estimator
from metier.planning.from_config import run_skeleton
from metier.planning.plan import Plan, plan
from metier.planning.sharding import RankEstimator
from metier.planning.spelling import size
from metier.planning.state import training_plan
from metier.planning.step import Batch, trace_step
from metier.planning.step_time import step_time
from tiny_models import tiny_model

BATCH = Batch(2, 64, 0.5)
FAMILIES = {DENSE: "llama", MOE: "deepseek_v2"}
NUM_LAYERS = {DENSE: 5, MOE: 6}
"""So that some are passed over."""
OPTIONS: dict[str, dict] = {
    "cpt": {"cpt_token_ids": [5, 6, 7, 8]},
    "trainable_tokens": {"token_indices": [70, 80]},
    "ladder": {"reduction": 2, "num_heads": 2},
    "fishmask": {"mask_records": 1},
}
NEED_WEIGHTS = ("adamss", "boft", "frod", "shira", "unilora")
"""PEFT begins them from the weights, or from numbers that it draws."""
NOT_TRACED = ("shadow", "cpt")
"""The one has a second stack of layers, the other a loss whose terms are chosen by numbers."""
NOT_ON_LATENTS = ("prefix", "cartridge")
TRACED = [name for name in METHODS if name not in (*NEED_WEIGHTS, *NOT_TRACED)]
ON_MOE = [
    name
    for name in TRACED
    if MOE in METHODS[name].fits and METHODS[name].provider == "metier" and name not in NOT_ON_LATENTS
]


def _config(name: str, folder: Path, **changes: object) -> RunConfig:
    values = {
        "select_top_k": 2 if METHODS[name].selects_experts else None,
        "per_device_train_batch_size": BATCH.num_rows,
        "max_length": BATCH.num_tokens,
        "dtype": "float32",
        **({"meft_r": 256} if name == "meft" else {}),
        "method_options": OPTIONS.get(name, {}),
        **changes,
    }
    return RunConfig(model="m", dataset="d", output_dir=str(folder), method=name, **values)


def _base(kind: str):
    return tiny_model(FAMILIES[kind], num_hidden_layers=NUM_LAYERS[kind])


EXACT = (-8e-4, 8e-4)
"""Masks and metrics of some hundred bytes; the models take 2 MB."""
BY_DATA = (-6e-4, 0.7)
"""Of how far back gradients go, and into which matrices, the plan takes the most that it can be."""
PEAKS = {
    **dict.fromkeys(("fishmask", "lt_sft", "gradient_mask", "heads"), BY_DATA),
    # each step drops layers that it draws, and may drop none
    "adapter_drop": (-6e-4, 0.3),
    # a layer that the trace passes over has gradients of 0 for its part of the cache
    **dict.fromkeys(("prefix", "cartridge"), (-0.02, 6e-4)),
    # the norms of all matrices are in the loss from the start; their graph goes at another moment
    "adalora": (-6e-4, 0.03),
    **dict.fromkeys(("pafi", "largest_entries"), (-3e-3, 3e-3)),
}
"""From the least to the most, as a share of what the trainer's step takes, by which the trace is off."""
FLOPS = {
    **dict.fromkeys(("fishmask", "lt_sft", "gradient_mask", "heads"), (0.0, 0.7)),
    "adapter_drop": (0.0, 0.3),
    **dict.fromkeys(("pafi", "largest_entries"), (-3e-3, 3e-3)),
    # it decomposes as it is wrapped, which a meta tensor does not
    "osf": (-0.03, 0.0),
    # as many pairs, but not the same of trained experts
    **dict.fromkeys(("esft", "expert_lora"), (-0.01, 0.01)),
}


UNLIKE = (
    "lora", "adalora", "vera", "ia3", "prompt", "prefix", "loha", "adaption_prompt", "vblora", "fourierft", "osf",
    "trainable_tokens", "supertuning", "delora",
)  # fmt: skip
"""Of PEFT's methods those that are traced in ways of their own; the others are slow tests."""
CHOSEN_BY_DATA = ("fishmask", "lt_sft", "gradient_mask", "heads", "pafi", "largest_entries")
"""So that how many entries are in which layer is not known before."""


def _tensors(state: object) -> Iterator[torch.Tensor]:
    """All that an optimizer keeps of a parameter, whatever holds it, but for the count of its steps."""
    if isinstance(state, torch.Tensor):
        yield state
    held = state if isinstance(state, dict) else vars(state) if hasattr(state, "ortho_matrix") else {}
    for name, value in held.items():
        if name != "step":
            yield from _tensors(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(
            pytest.param(
                name, DENSE, marks=() if name in UNLIKE or METHODS[name].provider != "PEFT" else pytest.mark.slow
            )
            for name in TRACED
            if DENSE in METHODS[name].fits
        ),
        *((name, MOE) for name in ON_MOE),
    ],
)
def test_peak_and_operations_are_those_of_the_trainers_step(name: str, kind: str, tmp_path: Path) -> None:
    config = _config(name, tmp_path)
    skeleton = run_skeleton(config, _base(kind).config)
    trace = trace_step(config, skeleton, BATCH)
    # the two have layers of one more kind each
    assert len(set(trace.stands_for)) < NUM_LAYERS[kind] or name in ("adaption_prompt", "lisa")
    state = run_skeleton(config, _base(kind).config).state(config)

    def check_state(trainer: Trainer) -> None:
        if name == "meft":  # rows have gradients and an optimizer of their own: tests/planning/test_from_config.py
            return
        built = training_plan(
            trainer.model,
            method=name,
            selection=skeleton.selection,
            row_state_dtype=config.meft_state_dtype,
            options=config.method_options,
        )
        if name == "qlora":  # whose base is not in NF4 here
            built = dataclasses.replace(built, base_bytes=state.base_bytes)
            built = dataclasses.replace(built, stored_bytes=state.stored_bytes, stored_how=state.stored_how)
        if name not in (*CHOSEN_BY_DATA, "lisa"):  # of which some layers rest now
            assert built == state
        if name in ("mezo", "adapter_drop"):  # nothing has gradients, or not what this step has drawn
            return
        trainer.create_optimizer()
        trainer.optimizer.step()
        moments = [x for one in trainer.optimizer.state.values() for x in _tensors(one)]
        wanted = (built if name in CHOSEN_BY_DATA else state).optimizer_bytes
        if name == "lisa":  # of each layer a share is planned, and not which ones are drawn
            assert kind == MOE or sum(x.nbytes for x in moments) == pytest.approx(wanted, rel=1e-3)
        else:
            assert sum(x.nbytes for x in moments) == wanted

    peak, operations = measured(_base(kind), config, skeleton.selection, BATCH, then=check_state)
    least, most = PEAKS.get(name, EXACT)
    assert least <= trace.peak_bytes / peak - 1 <= most
    least, most = FLOPS.get(name, (0.0, 0.0))
    flops = trace.flops("forward") + trace.flops("backward")
    assert least <= flops / operations.flops - 1 <= most


@pytest.mark.parametrize("name", [name for name in NEED_WEIGHTS if name != "adamss"])
def test_what_begins_from_the_weights_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(NeedsWeightsError, match=f"{name}: PEFT begins it from the model's weights"):
        run_skeleton(_config(name, tmp_path), _base(DENSE).config)


def test_a_second_network_says_so(tmp_path: Path) -> None:
    found = Estimator(_base(DENSE).config)(_config("shadow", tmp_path))
    assert found.trace is None
    assert "has 2 stacks of layers, expected one" in found.why_not_traced
    assert found.state.num_trained > 0


@pytest.mark.parametrize("name", ["lisa", "galore", "mezo", "full"])
def test_what_changes_the_base_itself_has_no_second_one(name: str, tmp_path: Path) -> None:
    found = Estimator(_base(DENSE).config)(_config(name, tmp_path))
    assert found.device_bytes["frozen weights"] == 0
    assert found.device_bytes["trained weights"] == found.state.base_bytes


def test_what_stands_beside_the_base_is_counted(tmp_path: Path) -> None:
    estimator = Estimator(_base(DENSE).config)
    sparse, fixed = (estimator(_config(name, tmp_path)) for name in ("random_mask", "vera"))
    # a position of four bytes and the base's own entry, for each that is trained
    assert sparse.state.kept_bytes == 8 * sparse.state.num_trained
    assert fixed.state.kept_bytes > 0
    for found in (sparse, fixed):
        assert found.device_bytes["frozen weights"] == found.state.base_bytes + found.state.kept_bytes


@pytest.mark.parametrize("name", ["lora", "random_mask", "vera", "ladder"])
def test_a_delta_is_as_large_as_its_file(name: str, tmp_path: Path) -> None:
    config = _config(name, tmp_path)
    found = Estimator(_base(DENSE).config)(config)
    wrap(_base(DENSE), config, None).save_pretrained(tmp_path / "adapter")
    files = (tmp_path / "adapter").glob("*.safetensors")
    assert found.delta_bytes == sum(x.nbytes for path in files for x in safetensors.torch.load_file(path).values())


def test_what_cannot_be_merged_costs_operations_or_positions(tmp_path: Path) -> None:
    base = _base(DENSE).config
    estimator = Estimator(base)
    found = {name: estimator(_config(name, tmp_path)) for name in ("lora", "ladder", "pfeiffer", "prompt", "prefix")}
    found = {
        name: dataclasses.replace(one, base_forward_flops=estimator.base_forward_flops(one.config))
        for name, one in found.items()
    }
    added = {name: one.added_at_inference for name, one in found.items()}
    assert added["lora"] == added["prompt"] == 0
    whole = estimator(_config("full", tmp_path)).trace.flops("forward")
    for name in ("ladder", "pfeiffer"):
        assert added[name] == found[name].trace.flops("forward") / whole - 1 > 0
    tokens = {name: one.num_virtual_tokens for name, one in found.items()}
    assert tokens["lora"] == tokens["pfeiffer"] == 0
    assert tokens["ladder"] is None
    assert tokens["prompt"] == tokens["prefix"] > 0
    names = ("prompt", "prefix", "lora", "ladder", "prefix_attention")
    made = plan_of(tmp_path, names)
    grown = dict(zip(names, (run["added_cache_bytes_at_32768_tokens"] for run in made.as_dict()["runs"]), strict=True))
    more = made.kv_cache.soft_prompt_bytes(tokens["prompt"], num_tokens=32_768)
    assert grown == {"prompt": more, "prefix": more, "lora": 0, "ladder": None, "prefix_attention": 0}
    assert f"+{size(more)}" in shown(made)


def plan_of(folder: Path, methods: tuple[str, ...] | None, **changes: object) -> Plan:
    _base(DENSE).config.save_pretrained(folder)
    config = dataclasses.replace(_config("lora", folder, **changes), model=str(folder))
    return plan(config, methods=methods, device_memory="8GiB", host_memory="8GiB")


def shown(made: Plan) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(made)
    return console.file.getvalue()


def test_many_methods_have_a_line_each(tmp_path: Path) -> None:
    names = ("lora", "dora", "bitfit", "pfeiffer", "mezo", "full", "boft", "esft", "random_mask")
    made = plan_of(tmp_path, names)
    assert [row.config.method for row in made.rows] == list(names)
    lines = shown(made).splitlines()
    for name in names:
        (line,) = [line for line in lines if line.startswith(f"│ {name} ")]
        assert {"boft": "not known", "esft": "no"}.get(name, "yes") in line.split("│")[-2]
    assert any("boft: PEFT begins it from the model's weights" in line for line in lines)


def test_where_nothing_was_measured_nothing_is_recommended(tmp_path: Path) -> None:
    made = plan_of(tmp_path, ("dora", "vera"))
    assert made.recommended is None
    assert "dora, vera: fits. Which scores best was not measured" in shown(made)
    one = plan_of(tmp_path, ("dora",))
    assert one.recommended is None
    assert one.rows[0].fits


def test_every_method_is_planned_by_one_word(tmp_path: Path, monkeypatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("metier.planning.plan.plan", lambda configs, **_: asked.extend(configs) or "")
    _base(DENSE).config.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--method", "every"])
    assert done.exit_code == 0, done.output
    assert [config.method for config in asked] == list(METHODS)


def test_a_run_is_planned_with_other_methods_without_what_is_not_theirs(tmp_path: Path) -> None:
    names = ("lora", "pfeiffer", "ia3", "prompt", "galore", "adalora")
    made = plan_of(tmp_path, names, lora_r=16, save_steps=10)
    assert [row.why_not for row in made.rows] == [""] * len(names)
    ranks = {row.config.method: row.config.lora_r for row in made.rows}
    assert (ranks["lora"], ranks["adalora"], ranks["prompt"]) == (16, 16, 8)


def test_a_method_that_the_run_cannot_have_does_not_end_the_others(tmp_path: Path) -> None:
    made = plan_of(tmp_path, ("prefix", "lora"), gradient_checkpointing=True)
    prefix, lora = made.rows
    assert lora.fits
    assert prefix.verdict == "no"
    assert "it cannot have this run's keys: gradient_checkpointing: prefix stands in the KV cache" in shown(made)
    with pytest.raises(ConfigError, match="prefix stands in the KV cache"):
        plan_of(tmp_path, ("prefix",), gradient_checkpointing=True)


def test_what_does_not_fit_is_not_changed_to_what_the_method_cannot_have(tmp_path: Path) -> None:
    _base(DENSE).config.save_pretrained(tmp_path)
    config = dataclasses.replace(_config("prefix", tmp_path), model=str(tmp_path))
    (row,) = plan(config, device_memory="1600KiB", host_memory="8GiB").rows
    assert row.lacking_bytes
    assert row.change is None or "gradient_checkpointing" not in row.change.keys


def test_an_adapters_fixed_matrices_are_counted_and_whole_buffers_in_each_process(tmp_path: Path) -> None:
    estimator = Estimator(_base(DENSE).config)
    fixed = estimator(_config("lora_fa", tmp_path))
    both = estimator(_config("lora", tmp_path))
    assert fixed.state.fixed_bytes + fixed.state.trained_bytes == both.state.trained_bytes
    assert fixed.device_bytes["frozen weights"] == fixed.state.base_bytes + fixed.state.fixed_bytes
    for name in ("vera", "lora_fa"):
        config = _config(name, tmp_path, fsdp=True)
        alone, sharded = (
            RankEstimator(estimator, number)(config).device_bytes["frozen weights"] for number in (1, 1_000)
        )
        kept = estimator.without_activations(config).state.kept_bytes
        assert alone - kept >= estimator.without_activations(config).state.base_bytes
        assert kept <= sharded < kept + 0.2 * (alone - kept)


def test_seconds_of_the_optimizer_are_those_of_what_has_gradients(tmp_path: Path) -> None:
    numbers: dict[str, int] = {}

    class Asked(DeviceClock):
        def optimizer(self, num_dense: int, num_in_rows: int, *, copies_rows: bool) -> float:
            numbers[name] = num_dense
            return 0.0

    estimator, clock = Estimator(_base(DENSE).config), Asked(device_of("h100"))
    for name in ("full", "lisa", "mezo"):
        step_time(estimator(_config(name, tmp_path)), clock)
    assert numbers["mezo"] == 0
    assert 0 < numbers["lisa"] < numbers["full"] == estimator(_config("full", tmp_path)).state.num_trained


@pytest.mark.parametrize("mask", ["heads"])
def test_heads_are_counted_without_listing_their_entries(mask: str, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("entries of heads were listed")

    monkeypatch.setattr("metier.methods.sparse_delta.entries.entries_of_heads", refuse)
    found = Estimator(_base(DENSE).config).without_activations(_config(mask, tmp_path))
    assert found.state.num_trained > 0


def test_a_pruned_difference_is_what_is_saved(tmp_path: Path) -> None:
    found = Estimator(_base(DENSE).config)(_config("diff_pruning", tmp_path, method_options={"density": 0.01}))
    # each entry has a difference and a gate; of the entries kept a value and a position of four bytes
    assert found.delta_bytes == pytest.approx(8 * 0.01 * found.state.num_trained / 2, rel=0.01)


def test_one_methods_own_options_are_options_of_a_plan(tmp_path: Path) -> None:
    _base(DENSE).config.save_pretrained(tmp_path)
    options = ["--method", "ladder", "--reduction", "2", "--num-heads", "2", "--device-memory", "8GiB"]
    done = CliRunner().invoke(
        app, ["plan", "--model", str(tmp_path), *options, "--host-memory", "8GiB", "-o", str(tmp_path / "plan.json")]
    )
    assert done.exit_code == 0, done.output
    (run,) = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert run["fits"]
    assert run["added_at_inference"] > 0
    assert run["num_virtual_tokens"] is None
