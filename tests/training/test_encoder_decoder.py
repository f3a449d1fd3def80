"""The whole walk on a Switch Transformer: prompts into the encoder, replies out of the decoder, padding counted nowhere."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

import metier
from families.configs import tiny_config
from metier.config import RunConfig
from metier.data.message import Message, Record
from metier.data.pairs import PairCollator, encode_pairs
from metier.data.records import load_records
from metier.errors import ModelError, SelectionError, UnsupportedModelError
from metier.evaluation.tasks import TaskSpec
from metier.models.load import LoadedModel
from metier.models.moe import moe_layers
from metier.routing.profile import count_pairs, count_sequences
from metier.training.run import train
from tiny_models import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::metier.routing.profile.UnreliableProfileWarning")

Configure = Callable[..., RunConfig]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """In place of the folder's base: a Switch Transformer with an MoE layer in each stack."""
    torch.manual_seed(0)
    config = tiny_config("switch_transformers")
    config.dropout_rate = config.router_jitter_noise = 0.0
    folder = tmp_path / "switch"
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(base: Path) -> LoadedModel:
    return metier.load(base)


def uneven(number: int = 12) -> list[Record]:
    """Prompts and replies of many lengths, so that there is much padding."""
    return [
        Record(
            messages=(
                Message(role="user", content=f"{i}? " * (1 + i % 5)),
                Message(role="assistant", content=f"{i}!" * (1 + i % 4)),
            ),
            origin=f"made:{i}",
        )
        for i in range(number)
    ]


def written(records: list[Record], folder: Path) -> Path:
    path = folder / "uneven.jsonl"
    path.write_text("".join(json.dumps({"messages": [m.to_dict() for m in r.messages]}) + "\n" for r in records))
    return path


def delta(folder: Path) -> dict[str, Tensor]:
    (path,) = (folder / "adapter").glob("*.safetensors")
    return load_file(path)


def test_a_run_trains_the_experts_of_both_stacks_and_its_delta_loads(configure: Configure, console: Console) -> None:
    result = train(configure(max_steps=12, top_p=0.5, eval_dataset=configure().dataset), console=console)
    assert result.selection is not None
    assert sorted(result.selection.experts) == [1, 3]
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
    records = load_records(configure().dataset)
    pairs = encode_pairs(records, result.tokenizer, max_length=128)
    # 12 steps of 3 of the 24 records: an epoch and a half
    assert pairs.num_tokens < [row["num_tokens"] for row in rows if "loss" in row][-1] < 2 * pairs.num_tokens
    assert f"{pairs.num_trained_tokens:,} of {pairs.num_tokens:,} tokens have a loss" in console.file.getvalue()  # type: ignore[attr-defined]
    fresh = metier.load(configure().model)
    tuned = peft.PeftModel.from_pretrained(fresh.model, result.folder / "adapter").eval()
    batch = PairCollator(0, 0)(pairs.items[:4])
    with torch.no_grad():
        want = result.model.eval()(**batch).logits
        assert torch.equal(tuned(**batch).logits, want)
        with tuned.disable_adapter():
            assert (tuned(**batch).logits - want).abs().max() > 1e-3
    assert metier.verify(result.folder / "adapter", configure().model).passed


def test_a_step_has_the_same_gradient_however_it_is_accumulated(
    configure: Configure, console: Console, tmp_path: Path
) -> None:
    # records of unlike lengths: a mean of the batches' means would weigh them otherwise
    path, deltas = written(uneven(), tmp_path), []
    for name, size, accumulated in (("one", 4, 1), ("four", 1, 4)):
        config = configure(
            name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            selection=str(_selection(tmp_path / "selection.json")),
        )
        deltas.append(delta(train(dataclasses.replace(config, dataset=str(path)), console=console).folder))
    for name, tensor in deltas[0].items():
        torch.testing.assert_close(deltas[1][name], tensor, rtol=1e-4, atol=1e-5)


def _selection(path: Path) -> Path:
    metier.ExpertSelection(experts={1: (0, 3), 3: (1, 2, 4)}).save(path)
    return path


def test_a_run_that_stopped_resumes_to_the_very_bits(configure: Configure, console: Console) -> None:
    whole = train(configure("whole", max_steps=6), console=console)
    train(configure("parted", max_steps=6, save_steps=3), console=console)
    folder = Path(configure("parted").output_dir)
    (folder / "checkpoints" / "checkpoint-6").rename(folder / "gone")
    resumed = train(configure("parted", max_steps=6, save_steps=3, resume_from_checkpoint="last"), console=console)
    want, got = delta(whole.folder), delta(resumed.folder)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("method", ["lora", "full", "expert_lora"])
def test_every_method_trains_one(configure: Configure, console: Console, method: str) -> None:
    result = train(configure(method=method), console=console)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]


def test_padding_is_not_counted_whatever_the_batch(loaded: LoadedModel) -> None:
    pairs = encode_pairs(uneven(), loaded.tokenizer, max_length=64).items
    alone = count_pairs(loaded.model, pairs, pad_token_id=0, batch_size=1, output_norms=True)
    together = count_pairs(loaded.model, pairs, pad_token_id=0, batch_size=5, output_norms=True)
    assert torch.equal(together.token_counts_HLE, alone.token_counts_HLE)
    torch.testing.assert_close(together.gate_mass_HLE, alone.gate_mass_HLE, rtol=1e-5, atol=1e-6)
    assert together.output_norm_HLE is not None
    torch.testing.assert_close(together.output_norm_HLE, alone.output_norm_HLE, rtol=1e-4, atol=1e-5)
    prompts, replies = (sum(map(len, side)) for side in zip(*((p.input_ids, p.labels) for p in pairs), strict=True))
    assert alone.token_counts_HLE.sum((0, 2)).tolist() == [prompts, replies]
    assert alone.num_tokens == prompts + replies
    assert alone.token_counts_HLE[0].sum(1).tolist() == [
        sum(len(p.input_ids) for p in pairs[::2]), sum(len(p.labels) for p in pairs[::2])
    ]  # fmt: skip


def test_the_counts_are_what_each_stacks_router_chose(loaded: LoadedModel) -> None:
    (pair,) = encode_pairs(uneven(1), loaded.tokenizer, max_length=64).items
    counted = count_pairs(loaded.model, [pair], pad_token_id=0, batch_size=1)
    seen: dict[int, Tensor] = {}
    for layer in moe_layers(loaded.model):
        layer.entry.register_forward_pre_hook(lambda _, args, i=layer.index: seen.__setitem__(i, args[1]))
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([pair.input_ids]), labels=torch.tensor([pair.labels]))
    for row, index in enumerate(counted.layer_ids):
        want = torch.bincount(seen[index].flatten(), minlength=counted.num_experts)
        assert torch.equal(counted.token_counts_HLE.sum(0)[row], want)


def test_a_profile_stops_at_the_tokens_asked_for_and_has_no_raw_scale(loaded: LoadedModel) -> None:
    profile = metier.profile(loaded.model, loaded.tokenizer, uneven(60), num_tokens=300, max_length=64)
    assert 200 < profile.num_tokens <= 300
    assert profile.meta["encoder_decoder"] == "true"
    with pytest.raises(SelectionError, match=r"scale: got 'raw'.* for an encoder-decoder"):
        profile.scores_LE("gate", scale="raw")
    torch.testing.assert_close(profile.scores_LE("gate").sum(1), torch.ones(2))


@torch.no_grad()
def slow_reply(loaded: LoadedModel, prompt: str, num_tokens: int, start: int) -> list[int]:
    """One token after the other, the prompt alone and nothing kept."""
    ids, said = torch.tensor([loaded.tokenizer(prompt)["input_ids"]]), [start]
    for _ in range(num_tokens):
        logits = loaded.model(input_ids=ids, decoder_input_ids=torch.tensor([said]), use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] == loaded.tokenizer.eos_token_id:
            break
    return said[1:]


# padding, with which such models begin, and a token that would be seen in a reply
@pytest.mark.parametrize("start", [0, 70])
def test_replies_of_a_batch_are_those_of_each_prompt_alone(loaded: LoadedModel, tmp_path: Path, start: int) -> None:
    loaded.model.config.decoder_start_token_id = loaded.model.generation_config.decoder_start_token_id = start
    # few enough that padding in front would push tokens out; the decoder's, one token a call, are never full
    for module in loaded.model.encoder.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 3
    records = uneven(6)
    task = TaskSpec(name="made", metrics=("chrf",), splits={"test": written(records, tmp_path)}, max_new_tokens=8)
    result = metier.evaluate(loaded.model, loaded.tokenizer, task=task, general=False, batch_size=4, num_samples=6)
    said = {sample.prompt: sample.reply for sample in result.samples}
    assert len(said) == 6
    for record in records:
        want = slow_reply(loaded, record.messages[0].content, 8, start)
        assert said[record.messages[0].content] == loaded.tokenizer.decode(want, skip_special_tokens=True).strip()


def test_general_ability_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"general ability: got an encoder-decoder .*\n.*general=False"):
        metier.evaluate(loaded.model, loaded.tokenizer, task="synopsis")


def test_rows_that_records_share_are_refused(configure: Configure, console: Console) -> None:
    with pytest.raises(UnsupportedModelError, match=r"padding_free: got an encoder-decoder .*\n.*padding_free: false"):
        train(configure(padding_free=True), console=console)


def test_full_sequences_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"count_sequences: got an encoder-decoder .*\n.*count_pairs"):
        count_sequences(loaded.model, torch.ones(2, 8, dtype=torch.int64), batch_size=1)


def test_a_decoder_without_a_first_token_is_refused(loaded: LoadedModel) -> None:
    loaded.model.config.decoder_start_token_id = loaded.model.generation_config.decoder_start_token_id = None
    pairs = encode_pairs(uneven(2), loaded.tokenizer, max_length=64).items
    with pytest.raises(ModelError, match=r"no decoder_start_token_id.*\n.*begin with the padding token"):
        count_pairs(loaded.model, pairs, pad_token_id=0, batch_size=1)


def test_the_preview_shows_prompt_and_reply(configure: Configure) -> None:
    from typer.testing import CliRunner

    from metier.cli import app

    config = configure()
    command = ["train", "--model", config.model, "--dataset", config.dataset, "--output_dir", config.output_dir]
    result = CliRunner().invoke(app, [*command, "--preview"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "What is 0 and 0?It is 0.<eos>" in result.output.replace("\n", "")
    assert "9 of 25 tokens trained on" in result.output


def test_meft_on_an_encoder_decoder_is_refused_before_it_trains(configure: Configure, console: Console) -> None:
    with pytest.raises(UnsupportedModelError, match="feed-forward blocks: got an encoder-decoder"):
        train(configure(method="meft", meft_r=64, meft_num_active_key_experts=4), console=console)
