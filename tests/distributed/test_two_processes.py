"""A run in two processes is the run of one: losses, gradients' norms, profile, selection and delta."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import metier
from distributed.launch import command, losses, metier_command, torchrun

LOSS, NORM, ROWS = 1e-6, 1e-5, 1e-5
"""Relative for losses and norms: what differs is the order of float32 sums, some 1e-7 here. Rows are of size 0.1."""


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory, run_file_of: Callable[..., Path]) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = command(metier_command("train", str(run_file_of(folder, "one"))))
    assert done.code == 0, done.text
    return folder / "one"


def same_run(one: Path, other: Path) -> None:
    mine, theirs = losses(one), losses(other)
    assert list(mine) == list(theirs)
    for step, line in mine.items():
        assert theirs[step]["loss"] == pytest.approx(line["loss"], rel=LOSS)
        assert theirs[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=NORM)
        assert theirs[step]["learning_rate"] == line["learning_rate"]
        assert theirs[step]["num_tokens"] == line["num_tokens"]
    assert (other / "profile.safetensors").read_bytes() == (one / "profile.safetensors").read_bytes()
    assert (other / "selection.json").read_text() == (one / "selection.json").read_text()
    rows, others = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert rows.keys() == others.keys()
    for name, tensor in rows.items():
        assert (tensor - others[name]).abs().max() < ROWS, name


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_train_as_one(
    sharding: str, alone: Path, world: Path, tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    done = torchrun(2, "train", str(run_file("two")), *(["--fsdp"] if sharding == "fsdp" else []))
    assert done.code == 0, done.text
    same_run(alone, tmp_path / "two")
    # what is said is said once
    assert done.text.count("2 processes, ") == 1
    assert done.text.count("Trained in") == 1
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "moe"), tmp_path / "two" / "adapter")
    assert model.peft_config["default"].peft_type == "ESFT"
    metier.verify(tmp_path / "two" / "adapter", base=str(world / "moe"))
    if sharding == "fsdp":
        measured = json.loads((tmp_path / "two" / "plan.json").read_text())["measured"]
        assert measured["weight_bytes_per_process"] <= 0.6 * measured["weight_bytes"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sharding"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_fifty_steps_are_those_of_one(
    processes: int, sharding: str, tmp_path: Path, run_file: Callable[..., Path]
) -> None:
    one = command(metier_command("train", str(run_file("one", max_steps=50))))
    assert one.code == 0, one.text
    options = ["--fsdp"] if sharding == "fsdp" else []
    done = torchrun(processes, "train", str(run_file("several", max_steps=50)), *options)
    assert done.code == 0, done.text
    same_run(tmp_path / "one", tmp_path / "several")


@pytest.mark.distributed
@pytest.mark.slow
def test_accelerate_launch_shards_by_its_own_configuration(alone: Path, tmp_path: Path, run_file) -> None:
    (tmp_path / "fsdp.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n"
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  fsdp_state_dict_type: SHARDED_STATE_DICT\n"
        "  fsdp_cpu_ram_efficient_loading: true\nnum_processes: 2\nmixed_precision: 'no'\nuse_cpu: true\n"
    )
    launcher = metier_command()[0]
    done = command(
        [launcher, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp.yaml"), "-m", "metier",
         "train", str(run_file("two"))]
    )  # fmt: skip
    assert done.code == 0, done.text
    assert "weights sharded over them (FSDP2)" in done.text
    assert "fsdp_cpu_ram_efficient_loading is turned off" in done.text
    same_run(alone, tmp_path / "two")
