"""A whole run on a tiny model: what it trains, what it prints, and what it leaves in its folder."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from metier.cli import app
from metier.config import RunConfig
from metier.config_reading import load_run_config
from metier.deltas.read import read_delta
from metier.errors import ConfigError, RunError, SelectionError
from metier.models.load import load
from metier.routing.selection import ExpertSelection
from metier.training.checkpoints import find_checkpoint
from metier.training.run import train

Configure = Callable[..., RunConfig]


def delta(folder: str | Path) -> dict[str, Tensor]:
    (path,) = (Path(folder) / "adapter").glob("*.safetensors")
    return load_file(path)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def num_tokens(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["num_tokens"] for row in rows if "loss" in row]


def test_a_run_leaves_the_folder_of_the_design(configure: Configure, console: Console) -> None:
    config = configure(save_steps=2)
    result = train(config, console=console)
    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        "run.yaml", "profile.safetensors", "profile.json", "selection.json", "plan.json", "metrics.jsonl",
        "checkpoints", "adapter", "report.html",
    }  # fmt: skip
    assert load_run_config(result.folder / "run.yaml") == config
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 0 for row in rows if "loss" in row)
    plan = json.loads((result.folder / "plan.json").read_text())
    saved = delta(result.folder)
    assert plan["predicted"]["num_trained_parameters"] == sum(
        t.numel() for t in saved.values() if t.is_floating_point()
    )
    assert plan["measured"]["train_seconds"] > 0
    loaded = load(config.model)
    model = peft.PeftModel.from_pretrained(loaded.model, result.folder / "adapter").eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("changes", "can", "is_told"),
    [
        ({"dtype": "bfloat16"}, {"architecture": "x86_64", "avx512_bw": False, "avx2": True}, True),
        ({"bf16": True}, {"architecture": "x86_64", "avx512_bw": False, "avx2": True}, True),
        ({"dtype": "bfloat16"}, {"architecture": "x86_64", "avx512_bw": True}, False),
        ({"dtype": "bfloat16"}, {"architecture": "aarch64"}, False),
        ({}, {"architecture": "x86_64", "avx512_bw": False}, False),
    ],
)
def test_a_cpu_without_bfloat16_is_told_of(
    configure: Configure,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    can: dict[str, object],
    is_told: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    train(configure(max_steps=1, **changes), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("This CPU has no instructions for bfloat16" in text) is is_told


def test_before_the_first_step_it_says_what_is_trained_per_layer(configure: Configure, console: Console) -> None:
    selection = Path(configure().output_dir + "-selection.json")
    ExpertSelection(experts={1: (2, 5), 2: (0,)}).save(selection)
    train(configure(selection=str(selection)), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    expert = 3 * 16 * 32
    assert f"esft: {3 * expert:,} parameters are trained" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "nothing" in lines["0"]
    assert "2 experts: 2, 5" in lines["1"]
    assert f"{2 * expert:,}" in lines["1"]
    assert "1 experts: 0" in lines["2"]
    assert "routed: 2 of 2 (experts); router: none of 2" in text[text.index("Covered: ") :]
    assert "nothing" in lines["other"]
    assert text.index("parameters are trained") < text.index("step 1/4")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_baselines_train_and_say_so(method: str, configure: Configure, console: Console) -> None:
    result = train(configure(method=method), console=console)
    losses = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in losses if "loss" in row][-1] < losses[0]["loss"]
    assert f"{method}: {result.plan.num_trained:,} parameters are trained" in console.file.getvalue()  # type: ignore[attr-defined]
    if method == "full":
        assert result.plan.num_frozen == 0
        assert load(result.folder / "adapter").model is not None
    else:
        experts = [n for n, p in result.model.named_parameters() if p.requires_grad]
        assert experts
        assert all(".mlp.experts." in name and "lora_" in name for name in experts)


def test_a_lora_on_selected_experts_is_planned_trained_and_loads_in_plain_peft(
    configure: Configure, console: Console, tmp_path: Path
) -> None:
    ExpertSelection(experts={1: (2, 5), 2: (0,)}).save(tmp_path / "selection.json")
    config = configure(method="expert_lora", selection=str(tmp_path / "selection.json"), lora_r=4, lora_dropout=0.1)
    result = train(config, console=console)
    sizes = 3 * 4 * ((32 + 2 * 16) + (16 + 32))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"expert_lora: {sizes:,} parameters are trained" in text
    assert "LoRA on 2 experts: 2, 5" in text
    model = peft.PeftModel.from_pretrained(load(config.model).model, result.folder / "adapter").eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)
        assert not torch.equal(model(input_ids=ids).logits, load(config.model).model(input_ids=ids).logits)
    assert read_delta(result.folder / "adapter").has_sums


def test_lora_with_dropout_on_stacked_experts_is_refused(configure: Configure, console: Console) -> None:
    with pytest.raises(ConfigError, match=r"lora_dropout: got 0\.1, but PEFT needs 0"):
        train(configure(method="lora", lora_dropout=0.1), console=console)


def test_a_selection_for_another_model_is_refused(configure: Configure, console: Console, tmp_path: Path) -> None:
    ExpertSelection(experts={1: (63,)}).save(tmp_path / "selection.json")
    with pytest.raises(SelectionError, match=r"layers\.1.*expert 63.*num_experts=8"):
        train(configure(selection=str(tmp_path / "selection.json")), console=console)


def test_records_that_are_too_long_are_reported_before_training(configure: Configure, console: Console) -> None:
    train(configure(max_length=29), console=console)
    assert "are longer than max_length=29 and left out" in console.file.getvalue()  # type: ignore[attr-defined]


def test_general_records_are_mixed_in(configure: Configure, console: Console, records: Path) -> None:
    train(configure(general_dataset=str(records)), console=console)
    assert "48 records" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_same_run_twice_gives_the_same_bits(configure: Configure, console: Console) -> None:
    one, other = (train(configure(name), console=console) for name in ("one", "other"))
    assert same_bits(delta(one.folder), delta(other.folder))


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_is_kept(
    configure: Configure, console: Console
) -> None:
    first = delta(train(configure(), console=console).folder)
    with pytest.raises(RunError, match="holds a run already"):
        train(configure(seed=3), console=console)
    assert same_bits(first, delta(configure().output_dir))


def test_resuming_a_run_that_was_configured_otherwise_is_refused(configure: Configure, console: Console) -> None:
    train(configure(save_steps=2), console=console)
    with pytest.raises(RunError, match=r"learning_rate was 0\.01, is 0\.02"):
        train(configure(learning_rate=2e-2, resume_from_checkpoint="last"), console=console)


def test_resuming_what_was_never_started_is_refused(configure: Configure, console: Console) -> None:
    with pytest.raises(RunError, match=r"no run\.yaml, so no run to resume"):
        train(configure(resume_from_checkpoint="last"), console=console)


def test_a_run_stopped_before_its_first_checkpoint_begins_again(configure: Configure, console: Console) -> None:
    straight = train(configure("straight"), console=console)
    stopped = train(configure("stopped"), console=console)
    (stopped.folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    shutil.rmtree(stopped.folder / "adapter")
    again = train(configure("stopped", resume_from_checkpoint="last"), console=console)
    assert "Resuming from the beginning" in console.file.getvalue()  # type: ignore[attr-defined]
    assert same_bits(delta(straight.folder), delta(again.folder))


def test_a_run_goes_on_from_the_last_checkpoint_that_was_written_in_full(
    configure: Configure, console: Console
) -> None:
    folder = train(configure(save_steps=1), console=console).folder
    straight, counted = delta(folder), num_tokens(folder)
    assert sorted(set(counted)) == counted
    shutil.rmtree(folder / "adapter")
    # killed after the last file of a checkpoint, before its marker, or while that was written
    (folder / "checkpoints" / "checkpoint-3" / "complete").unlink()
    (folder / "checkpoints" / "checkpoint-4" / "complete").rename(folder / "checkpoints" / "checkpoint-4" / ".complete")
    again = train(configure(save_steps=1, resume_from_checkpoint="last"), console=console)
    said = console.file.getvalue().replace("\n", "")  # type: ignore[attr-defined]
    assert re.findall(r"Resuming from \S*(checkpoint-\d)", said) == ["checkpoint-2"]
    assert same_bits(straight, delta(again.folder))
    assert num_tokens(folder) == counted
    assert find_checkpoint(folder / "checkpoints", "last") == folder / "checkpoints" / "checkpoint-4"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "adapter_model.safetensors"])
def test_a_checkpoint_that_has_lost_a_file_is_not_resumed_without_it(
    name: str, configure: Configure, console: Console
) -> None:
    """The trainer itself would go on with a fresh optimizer, and say nothing."""
    folder = train(configure(save_steps=2), console=console).folder
    shutil.rmtree(folder / "adapter")
    lost = folder / "checkpoints" / "checkpoint-4" / name
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(RunError, match=rf"{re.escape(name)}: is missing, was written with {len(kept):,}"):
        train(configure(save_steps=2, resume_from_checkpoint="last"), console=console)
    lost.write_bytes(kept[:-1])
    with pytest.raises(RunError, match=rf"{re.escape(name)}: has {len(kept) - 1:,} bytes, was written with"):
        train(configure(save_steps=2, resume_from_checkpoint=str(lost.parent)), console=console)
    # an older one is whole, and the run goes on when the file is back
    lost.write_bytes(kept)
    train(configure(save_steps=2, resume_from_checkpoint="last"), console=console)


def test_an_incomplete_checkpoint_and_one_of_another_run_are_refused(configure: Configure, console: Console) -> None:
    result = train(configure(), console=console)
    torn = result.folder / "checkpoints" / "checkpoint-2"
    torn.mkdir(parents=True)
    with pytest.raises(RunError, match="is not a complete checkpoint"):
        train(configure(resume_from_checkpoint=str(torn)), console=console)
    other = train(configure("other", save_steps=2), console=console).folder / "checkpoints" / "checkpoint-2"
    with pytest.raises(RunError, match="is not a checkpoint of this run"):
        train(configure(resume_from_checkpoint=str(other)), console=console)


def test_of_a_checkpoint_by_any_name_the_steps_that_are_left_are_foreseen(
    configure: Configure, console: Console
) -> None:
    folder = train(configure(save_steps=2, max_steps=5), console=console).folder
    kept = (folder / "checkpoints" / "checkpoint-2").rename(folder / "checkpoints" / "kept")
    train(configure(save_steps=2, max_steps=5, resume_from_checkpoint=str(kept)), console=console)
    predicted = json.loads((folder / "plan.json").read_text())["predicted"]
    assert predicted["train_seconds"] == pytest.approx(3 * predicted["step_seconds"])


def test_a_limit_keeps_the_newest_checkpoints(configure: Configure, console: Console) -> None:
    result = train(configure(save_steps=1, save_total_limit=2), console=console)
    assert {path.name for path in (result.folder / "checkpoints").glob("checkpoint-*")} == {
        "checkpoint-3",
        "checkpoint-4",
    }


WHOLE = {"train_shared_experts": True, "train_router": True, "train_attention": True, "train_norms": True}


@pytest.mark.parametrize("method", ["esft", "expert_lora", "lora", "full", "esft and more"])
def test_a_run_killed_with_sigkill_and_resumed_gives_the_same_bits(
    method: str, kill_and_resume: Callable[..., tuple[Path, Path]]
) -> None:
    more = {**WHOLE, "router_learning_rate": 1e-4, "norms_learning_rate": 3e-3} if "more" in method else {}
    options = {"method": method.split()[0], **more, "max_steps": 30, "save_steps": 2, "gradient_accumulation_steps": 2}
    straight, resumed = kill_and_resume(**options)
    assert same_bits(delta(straight), delta(resumed))
    steps = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, 31))


def rows_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("method", ["esft", "expert_lora", "lora", "full"])
def test_a_padding_free_run_has_the_losses_of_a_padded_one(
    method: str, configure: Configure, console: Console, records: Path
) -> None:
    with records.open("a") as file:
        for number in range(1, 13):
            prompt = {"role": "user", "content": f"Count to {number}."}
            reply = {"role": "assistant", "content": " ".join(map(str, range(number)))}
            file.write(json.dumps({"messages": [prompt, reply]}) + "\n")
    options = {"method": method, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    padded = rows_of(train(configure("padded", **options), console=console).folder)
    free = rows_of(train(configure("free", padding_free=True, **options), console=console).folder)
    # float32: rows are added up in another order, and AdamW's first steps depend on a gradient's sign
    assert [row["loss"] for row in free] == pytest.approx([row["loss"] for row in padded], rel=1e-3)
    assert [row["num_tokens"] for row in free] == [row["num_tokens"] for row in padded]


@pytest.mark.parametrize("method", ["esft", "full"])
def test_bf16_trains_on_a_host_without_an_accelerator(method: str, configure: Configure, console: Console) -> None:
    result = train(configure(method=method, bf16=True), console=console)
    losses = [row["loss"] for row in rows_of(result.folder)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    # what is left is the model itself, in its own dtype, and not one that computes in autocast
    ids, model = torch.arange(3, 40).unsqueeze(0), result.model.eval()
    base = load(configure().model).model
    fresh = load(str(result.folder / "adapter")).model if method == "full" else None
    fresh = peft.PeftModel.from_pretrained(base, result.folder / "adapter") if fresh is None else fresh
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, fresh.eval()(input_ids=ids).logits)
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_run_tells_of_much_padding_once_and_not_where_there_is_none(
    configure: Configure, console: Console, records: Path
) -> None:
    train(configure("even"), console=console)
    assert "is padding" not in console.file.getvalue()  # type: ignore[attr-defined]
    long = {"role": "user", "content": "How much is it, then? " * 4}
    with records.open("a") as file:
        for _ in range(12):
            file.write(json.dumps({"messages": [long, {"role": "assistant", "content": "Much."}]}) + "\n")
    train(configure("uneven", max_length=256), console=console)
    assert "of what a batch computes is padding; padding_free: true leaves it out." in console.file.getvalue()  # type: ignore[attr-defined]
    train(configure("free", max_length=256, padding_free=True), console=console)
    assert console.file.getvalue().count("is padding") == 1  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")
def test_routing_before_and_after_a_run_is_compared_from_the_command_line(
    configure: Configure, console: Console, tmp_path: Path
) -> None:
    config = configure()
    result = train(config, console=console)
    for name, extra in (("before", []), ("after", ["--adapter", str(result.folder / "adapter")])):
        command = ["profile", config.model, config.dataset, "-o", str(tmp_path / name), "--num-tokens", "512", *extra]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    names = [f"{name}={tmp_path / name}" for name in ("before", "after")]
    command = ["analyse", *names, "--drift", "before=after", "-o", str(tmp_path / "page")]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    values = json.loads((tmp_path / "page" / "analysis.json").read_text())
    assert max(layer["moved_share"] for layer in values["drifts"]["before → after"]["layers"]) > 0
    assert "Drift: before → after" in (tmp_path / "page" / "analysis.html").read_text()
    for wrong, message in (("before", "expected NAME=FOLDER"), ("before=", "expected NAME=FOLDER")):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(app, ["analyse", wrong], catch_exceptions=False)
    with pytest.raises(ConfigError, match="expected each once"):
        CliRunner().invoke(app, ["analyse", names[0], names[0]], catch_exceptions=False)
