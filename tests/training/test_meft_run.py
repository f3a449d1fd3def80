"""Runs of the method meft: on a dense and an MoE base, in every tier, killed and resumed, and in other trainers."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from metier.config import RunConfig
from metier.errors import ConfigError, NotFiniteError, RowStoreError, RunError
from metier.memory import RowAdamW
from metier.methods.meft import MeftConfig
from metier.training.run import train
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

Configure = Callable[..., RunConfig]
MEFT = {"method": "meft", "meft_r": 64, "meft_num_active_key_experts": 4, "meft_top_k": 8}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def dense_base(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_run_says_what_it_trains_moves_rows_and_counts_them(
    kind: str, configure: Configure, console: Console, base: Path, tmp_path: Path
) -> None:
    if kind == "dense":
        dense_base(base)
    result = train(configure(**MEFT), console=console)
    told = console.file.getvalue()
    assert "num_key_experts 16: routing costs least near" in told
    assert "num_active_key_experts 4: as configured" in told
    assert "64 rows in 16 Key-Experts (host), and their router" in told
    num_layers = 2 if kind == "dense" else 3
    plan = json.loads((result.folder / "plan.json").read_text())["predicted"]
    assert plan["num_trained_parameters"] == num_layers * (64 * 2 + 16) * 32
    assert plan["optimizer_bytes"] == num_layers * ((64 * 2 + 16) * 32 * 8 + 64 * 4)
    rows = {name: tensor for name, tensor in tensors(result.folder).items() if name.endswith("meft_rows")}
    assert len(rows) == num_layers
    assert all(tensor[:, 1].any() for tensor in rows.values())
    logged = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["rows_updated"] <= num_layers * 64 for row in logged if "loss" in row)
    assert all(row["key_expert_load_max"] >= 1 for row in logged if "loss" in row)


def test_lora_on_a_dense_model_is_on_every_linear_layer_but_the_head(
    configure: Configure, console: Console, base: Path
) -> None:
    dense_base(base)
    result = train(configure(method="lora", lora_r=4, lora_dropout=0.1), console=console)
    assert "lora on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in console.file.getvalue()
    # r times inputs and outputs of q, k, v, o and of gate, up, down
    assert result.plan.num_trained == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), result.folder / "adapter").eval()
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"meft_store": "device"},
        {"meft_store": "host", "meft_update": "exact"},
        {"meft_store": "disk", "meft_update": "exact", "meft_state_dtype": "int8", "meft_row_dtype": "bfloat16"},
    ],
    ids=["device", "host", "disk"],
)
def test_a_run_killed_with_sigkill_and_resumed_gives_the_same_bits(
    options: dict[str, str], kill_and_resume: Callable[..., tuple[Path, Path]]
) -> None:
    straight, resumed = kill_and_resume(**MEFT, **options, max_steps=30, save_steps=2, gradient_accumulation_steps=2)
    one, other = tensors(straight), tensors(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (resumed / "rows").exists()


def test_the_tiers_give_the_same_bits(configure: Configure, console: Console) -> None:
    found = [
        tensors(train(configure(tier, **MEFT, meft_store=tier), console=console).folder)
        for tier in ("device", "host", "disk")
    ]
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


def test_sizes_that_do_not_fit_are_refused_before_anything_is_loaded(configure: Configure, console: Console) -> None:
    with pytest.raises(ConfigError, match=r"^method meft: meft_r=97 cannot .*\nTake meft_r=84, or give meft_num_key_e"):
        train(configure(method="meft", meft_r=97), console=console)
    assert console.file.getvalue() == ""


def test_what_the_disk_has_lost_is_not_kept_as_a_checkpoint(
    configure: Configure, console: Console, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that ended halfway is no state of any step."""
    dense_base(base)

    def lost(*_: object) -> None:
        raise RowStoreError("rows: the disk could not take 10 bytes of rows, which are lost.")

    class Fail(TrainerCallback):
        def on_step_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
            if state.global_step == 2:
                monkeypatch.setattr("metier.memory.row_adamw.update_rows", lost)

    monkeypatch.setattr("metier.training.run.CountRows", lambda *_: Fail())
    config = configure(**MEFT, meft_store="disk", max_steps=4)
    with pytest.raises(RowStoreError, match="which are lost"):
        train(config, console=console)
    assert list(Path(config.output_dir).rglob("complete")) == []


def test_a_resumed_runs_rows_are_read_into_host_memory(
    configure: Configure, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure(**MEFT, max_steps=4, save_steps=2), console=console)
    read: list[object] = []
    plain = peft.peft_model.load_peft_weights

    def recorded(model_id: str, device: str | None = None, **options: object) -> dict[str, torch.Tensor]:
        read.append(device)
        return plain(model_id, device="cpu", **options)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", recorded)
    monkeypatch.setattr(peft.peft_model, "infer_device", lambda: "cuda")
    folder = Path(configure().output_dir)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    train(configure(**MEFT, max_steps=4, save_steps=2, resume_from_checkpoint="last"), console=console)
    assert read == ["cpu"]


def trainer_of(model: peft.PeftModel, folder: Path, **options: object) -> Trainer:
    tokenizer = tiny_tokenizer()
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=4, learning_rate=1e-2, report_to="none", save_steps=2, use_cpu=True
        ),
        train_dataset=Dataset.from_list([tokenizer(f"record {n} of a few") for n in range(12)]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        **options,
    )


def wrapped() -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model("deepseek_v2"), MeftConfig(r=64, num_active_key_experts=4, top_k=8))


def test_transformers_trainer_trains_saves_and_resumes_it(tmp_path: Path) -> None:
    model = wrapped()
    options = {"optimizer_cls_and_kwargs": (RowAdamW, {"lr": 1e-2})}
    trainer_of(model, tmp_path, **options).train()
    resumed = wrapped()
    trainer_of(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = [m.base_model.model.model.layers[1].mlp.stores["default"].rows_NMWD for m in (model, resumed)]
    assert state[0][:, :, 1].any()
    assert torch.equal(*state)


def test_an_optimizer_that_knows_no_stores_is_refused_with_the_one_that_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="optimizer_cls_and_kwargs=\\(RowAdamW"):
        trainer_of(wrapped(), tmp_path).train()


def test_a_run_leaves_a_report_of_its_rows(configure: Configure, console: Console) -> None:
    folder = train(configure(**MEFT), console=console).folder
    page = (folder / "report.html").read_text()
    assert "rows updated" in page
    assert "metier train: run" in page
    assert "load of Key-Experts" in page
    assert "layers.1.mlp" in page


def test_a_run_counts_the_tokens_of_each_key_expert(configure: Configure, console: Console) -> None:
    config = configure(**MEFT, logging_steps=3, max_steps=4)
    folder = train(config, console=console).folder
    counted = json.loads((folder / "key_expert_tokens.json").read_text())
    assert counted["num_steps"] == 4
    sums = {sum(counts) for counts in counted["tokens"].values()}
    # four Key-Experts a token, the same tokens in every layer
    assert len(counted["tokens"]) == 3
    assert len(sums) == 1
    assert sums.pop() % 4 == 0
    assert {len(counts) for counts in counted["tokens"].values()} == {16}
    # what is recomputed or evaluated besides is not trained on
    more = {"gradient_checkpointing": True, "eval_dataset": config.dataset, "num_train_epochs": 1}
    again = configure("again", **MEFT, **more, logging_steps=3, max_steps=4)
    other = json.loads((train(again, console=console).folder / "key_expert_tokens.json").read_text())
    assert [sum(counts) for counts in other["tokens"].values()] == [sum(c) for c in counted["tokens"].values()]


def test_a_run_clips_gradients_of_rows_in_parts(
    configure: Configure, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "torch's clipping reads all of them at once"
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: pytest.fail(refused))
    norms = {}
    for limit in (1e-3, 1e3):
        result = train(configure(str(limit), **MEFT, max_steps=2, max_grad_norm=limit), console=console)
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        norms[limit] = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert norms[1e-3][0] == norms[1e3][0] > 1e-3


@pytest.mark.parametrize("is_early", [True, False])
def test_rows_on_disk_go_when_a_run_ends_with_an_error(
    is_early: bool, configure: Configure, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, calls = os.posix_fallocate, []

    def full(*args: object) -> None:
        calls.append(args)
        if len(calls) > (2 if is_early else 5):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*args)

    monkeypatch.setattr(os, "posix_fallocate", full)
    config = configure(**MEFT, meft_store="disk")
    with pytest.raises(RowStoreError, match="No space left on device"):
        train(config, console=console)
    assert not (Path(config.output_dir) / "rows").exists()


def test_steps_before_a_gradient_that_is_no_number_are_kept(
    configure: Configure, console: Console, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_base(base)
    plain, steps = RowAdamW._check_finite, [0]

    def check_finite(optimizer: RowAdamW) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # the machine's own time of a step is measured too, on rows alone
        steps[0] += len(parameters) > 1
        if steps[0] == 3:
            next(p for p in parameters if p.grad is not None).grad.fill_(float("nan"))
        plain(optimizer)

    monkeypatch.setattr(RowAdamW, "_check_finite", check_finite)
    config = configure(**MEFT, max_steps=5)
    with pytest.raises(RunError, match=r"not finite(?s:.*)The 2 steps before are kept in .*checkpoint-2") as told:
        train(config, console=console)
    assert isinstance(told.value.__cause__, RowStoreError)
    kept = Path(config.output_dir) / "checkpoints" / "checkpoint-2"
    assert (kept / "complete").exists()
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), kept)
    assert all(store.rows_NMWD[:, :, 1].any() for m in model.modules() for store in getattr(m, "stores", {}).values())
    monkeypatch.setattr(RowAdamW, "_check_finite", plain)
    again = dataclasses.replace(config, resume_from_checkpoint="last")
    assert train(again, console=console).folder == Path(config.output_dir)


def test_a_gradient_that_is_no_number_is_told_of_where_steps_before_cannot_be_kept(
    configure: Configure, console: Console, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_base(base)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def infinite(optimizer: RowAdamW) -> None:
        if len(optimizer.state) > 0:
            raise NotFiniteError("rows: not finite")

    monkeypatch.setattr(RowAdamW, "_check_finite", infinite)
    monkeypatch.setattr(Trainer, "_save_checkpoint", no_room)
    with pytest.raises(RunError, match=r"not finite(?s:.*)could not be kept in .*checkpoint-1.*No space left"):
        train(configure(**MEFT, max_steps=3), console=console)
