"""Runs whose base lies frozen in a store: the same delta, the same resume, and what the run says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from metier.config import RunConfig
from metier.errors import ConfigError
from metier.training.run import train

Configure = Callable[..., RunConfig]
pytestmark = pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["esft", "expert_lora", "meft"])
@pytest.mark.parametrize("store", ["host", "disk"])
def test_a_run_gives_the_same_delta_to_the_bit(
    store: str, method: str, configure: Configure, console: Console, tmp_path: Path
) -> None:
    options = {"method": method, **({"meft_r": 64} if method == "meft" else {})}
    straight = train(configure("in-memory", **options), console=console)
    stored = train(
        configure("stored", base_store=store, base_folder=str(tmp_path / "b") if store == "disk" else None, **options),
        console=console,
    )
    assert same(straight.folder, stored.folder)
    if store == "disk":
        assert list((tmp_path / "b").iterdir()) == []


def test_a_run_says_where_the_base_is_and_what_was_read(configure: Configure, console: Console) -> None:
    result = train(configure(base_store="disk", base_format="int8"), console=console)
    told = " ".join(console.file.getvalue().split())
    assert "of it on disk in int8)" in told
    plan = json.loads((result.folder / "plan.json").read_text())["predicted"]
    assert 0 < plan["stored_base_bytes"] < plan["base_bytes"]
    logged = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "loss" in line]
    assert all(line["base_bytes_from_disk"] >= 0 and line["base_stall_seconds"] >= 0 for line in steps)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(kill_and_resume: Callable[..., tuple[Path, Path]]) -> None:
    straight, resumed = kill_and_resume(base_store="disk", max_steps=40, save_steps=4)
    assert same(straight, resumed)


def test_a_run_may_go_on_with_its_base_in_another_place(configure: Configure, console: Console) -> None:
    train(configure("straight", max_steps=4), console=console)
    moved = configure("moved", max_steps=4, save_steps=2)
    train(moved, console=console)
    for name in ("adapter/adapter_model.safetensors", "checkpoints/checkpoint-4/complete"):
        (Path(moved.output_dir) / name).unlink()
    again = train(
        configure("moved", max_steps=4, save_steps=2, base_store="disk", resume_from_checkpoint="last"), console=console
    )
    assert same(again.folder, again.folder.with_name("straight"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full", "base_store": "disk"}, r"method full changes them\. Use a method that stands"),
        ({"method": "galore", "base_format": "int8"}, r"method galore changes them\."),
        (
            {"base_folder": "somewhere"},
            r"base_folder: got 'somewhere', but the base's weights are in no store\. Set base_store or",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(configure: Configure, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(**options)


BESIDE = ["qlora", "lora_plus", "vera", "prompt", "prefix_attention", "pfeiffer", "ladder", "shira"]


@pytest.mark.parametrize("method", BESIDE)
def test_methods_that_stand_beside_the_base_give_the_same_adapter_on_a_stored_one(
    method: str, configure: Configure, console: Console
) -> None:
    options = {
        "method": method,
        "method_options": {"ladder": {"reduction": 2, "num_heads": 2}, "shira": {"r": 4}}.get(method, {}),
    }
    if method == "lora_plus":
        options["targets"] = "attention"
    plain = configure("in-memory", **options)
    if method == "qlora":
        # what makes it what it is: the other runs keep the base as it is
        assert plain.base_format == "nf4"
        result = train(plain, console=console)
        assert "of it on the device in nf4)" in " ".join(console.file.getvalue().split())
        assert any("lora_B" in name and tensor.any() for name, tensor in tensors(result.folder).items())
        return
    assert same(
        train(plain, console=console).folder,
        train(configure("stored", base_store="host", **options), console=console).folder,
    )


@pytest.mark.parametrize("method", ["full", "mezo", "fishmask", "pissa"])
def test_methods_that_change_the_base_are_refused_on_a_stored_one(method: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=f"method {method} changes them. Use a method that stands beside them"):
        configure(method=method, base_store="host")


def test_lora_on_stored_experts_is_refused_for_it_forms_their_changed_weights(
    configure: Configure, console: Console
) -> None:
    with pytest.raises(ConfigError, match=r"experts\.\w+ lies in a store .*\nUse method: expert_lora"):
        train(configure(method="lora", base_store="host"), console=console)
    beside = train(configure("beside", method="lora", targets="attention", base_store="host"), console=console)
    assert any("lora_B" in name and tensor.any() for name, tensor in tensors(beside.folder).items())
