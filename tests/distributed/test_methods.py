"""Methods in two processes, with copies of the weights and with shards: the losses and the delta of one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distributed.launch import command, losses

LOSS, TENSOR = 1e-5, 1e-4
"""Relative for losses. AdamW's first steps are as large as the learning rate (1e-2) whatever a gradient's size, so where
a gradient is nearly nothing another order of sums moves a number by a part of that."""

MOE: dict[str, dict[str, object]] = {
    "expert_lora": {},
    "meft": {"meft_r": 64},
    "lora": {},
    "full": {},
    "ia3": {},
    "houlsby": {},
}
DENSE: dict[str, dict[str, object]] = {
    "lora": {},
    "dora": {},
    "prompt": {},
    "prefix_attention": {},
    "parallel_adapter": {},
    "vera": {},
    "meft": {"meft_r": 64},
}
COPIES: dict[str, dict[str, object]] = {
    "esft_host": {"method": "esft", "base_store": "host", "select_top_k": 3},
    "meft_exact": {"method": "meft", "meft_r": 64, "meft_update": "exact"},
    "lora_int8": {"method": "lora", "targets": "attention", "base_format": "int8"},
    "esft_without_padding": {"method": "esft", "padding_free": True, "select_top_k": 3},
}
"""What goes with copies of the weights alone."""
ENTRIES: dict[str, dict[str, object]] = {"norms": {}, "fishmask": {}}
CASES = [("moe", sharding) for sharding in ("ddp", "fsdp")] + [("dense", sharding) for sharding in ("ddp", "fsdp")]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sharding"), CASES)
def test_methods_train_as_in_one_process(
    kind: str, sharding: str, world: Path, tmp_path: Path, run_file_of: Callable[..., Path]
) -> None:
    by_copies = {"moe": COPIES, "dense": ENTRIES}[kind] if sharding == "ddp" else {}
    methods = {"moe": MOE, "dense": DENSE}[kind] | by_copies
    files: dict[str, list[str]] = {"one": [], "two": []}
    for side, paths in files.items():
        (tmp_path / side).mkdir()
        for method, options in methods.items():
            selects = {} if method == "expert_lora" else {"select_top_k": None}
            changes = {"model": str(world / kind), "method": method, "max_steps": 5, **selects, **options}
            paths.append(str(run_file_of(tmp_path / side, method, **changes)))
    script = str(Path(__file__).with_name("many_runs.py"))
    one = command([sys.executable, script, *files["one"]])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sharded = ["--fsdp"] if sharding == "fsdp" else []
    two = command([sys.executable, *launcher, script, *files["two"], *sharded])
    for method in methods:
        assert f"RESULT {method} ok" in one.text, one.text
        assert f"RESULT {method} ok" in two.text, two.text
        mine, theirs = losses(tmp_path / "one" / method), losses(tmp_path / "two" / method)
        assert len(mine) == 5
        for step, line in mine.items():
            assert theirs[step]["loss"] == pytest.approx(line["loss"], rel=LOSS), f"{method}, step {step}"
        whole = "model.safetensors" if method == "full" else "adapter_model.safetensors"
        rows, others = (load_file(tmp_path / side / method / "adapter" / whole) for side in files)
        assert rows.keys() == others.keys(), method
        for name, tensor in rows.items():
            assert (tensor.float() - others[name].float()).abs().max() < TENSOR, f"{method}: {name}"
