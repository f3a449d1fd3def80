"""Deltas that are LoRAs on experts: saved, read, verified, merged; bound to their ranks and scales; refused where whole
rows are needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import metier
from deltas.made import FAMILIES, assert_untouched, logits, made_base, state
from metier.deltas.compose import compose
from metier.deltas.compress import compress
from metier.deltas.esft_checkpoint import write_esft_checkpoint
from metier.deltas.inspect import inspect
from metier.deltas.merge import merge
from metier.deltas.read import read_delta
from metier.deltas.save import save_delta
from metier.deltas.verify import DIFFERS, MERGED, MOVED, ZERO, verify
from metier.errors import CorruptDeltaError, DeltaError
from metier.methods.expert_lora import ExpertLoraConfig

EXPERTS = {1: [0, 3, 5], 2: [2]}
RANKS = {1: {3: 2}}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""float32: thin products beside the base's, or one product with the changed weights."""


def made_lora(model: torch.nn.Module, experts: dict[int, list[int]] = EXPERTS) -> peft.PeftModel:
    """`model` with a LoRA of which every factor has moved, up to each expert's rank."""
    config = ExpertLoraConfig(experts=experts, r=4, lora_alpha=8, ranks=RANKS if 1 in experts else None)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
                if ".layers.1." in name and 1 in experts:
                    parameter[1, :, 2:] = 0  # beyond the rank of expert 3
    return wrapped.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base's folder and a delta's."""
    folder = tmp_path_factory.mktemp("low_rank")
    base = made_base(folder / "base")
    save_delta(made_lora(base.model), folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.fixture
def delta(saved: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "adapter"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_lora_answers_as_the_adapter_in_plain_transformers(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = made_base(tmp_path / "base", family, dtype=dtype)
    first = next(layer.index for layer in metier.moe_layers(base.model))
    wrapped = made_lora(base.model, {first: [0, 3], 2: [2]})
    want = logits(wrapped)
    save_delta(wrapped, tmp_path / "adapter")
    wrapped.unload()
    before, plain = state(base.model), logits(base.model)
    merge(tmp_path / "adapter", base, tmp_path / "merged")
    assert_untouched(base.model, before)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    got = logits(merged)
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, **TOLERANCE)
    assert (got - want).abs().mean() < (plain - want).abs().mean() / 4


def test_the_saved_delta_loads_in_plain_peft_with_the_same_bits(saved: tuple[Path, Path]) -> None:
    want = logits(made_lora(metier.load(saved[0]).model))
    got = logits(peft.PeftModel.from_pretrained(metier.load(saved[0]).model, str(saved[1])).eval())
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_check_of_a_good_delta_passes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = made_base(tmp_path / "base", dtype=dtype)
    save_delta(made_lora(base.model), tmp_path / "adapter")
    report = verify(tmp_path / "adapter", metier.load(tmp_path / "base"))
    assert [check for check in report.checks if check.status != "passed"] == []


def test_a_lora_of_zero_is_found_out(tmp_path: Path) -> None:
    base = made_base(tmp_path / "base")
    save_delta(peft.get_peft_model(base.model, ExpertLoraConfig(experts=EXPERTS, r=4)), tmp_path / "adapter")
    report = verify(tmp_path / "adapter", metier.load(tmp_path / "base"))
    failed = {check.name for check in report.checks if check.status == "failed"}
    assert {MOVED, DIFFERS} <= failed
    assert not {MERGED, ZERO} & failed


def test_a_change_too_small_for_the_bases_dtype_is_found_out(tmp_path: Path) -> None:
    base = made_base(tmp_path / "base", dtype=torch.bfloat16)
    wrapped = made_lora(base.model)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "down_B." in name:
                parameter.mul_(1e-10)
    save_delta(wrapped, tmp_path / "adapter")
    (moved,) = [c for c in verify(tmp_path / "adapter", metier.load(tmp_path / "base")).checks if c.name == MOVED]
    assert moved.status == "failed"
    assert "layers.1 expert 0 down_proj" in moved.sentence


def test_inspect_shows_ranks_and_parameters(saved: tuple[Path, Path]) -> None:
    summary = inspect(saved[1])
    assert (summary.method, summary.ranks) == ("EXPERT_LORA", (2, 4))
    tensors = load_file(saved[1] / "adapter_model.safetensors")
    assert summary.num_parameters == sum(t.numel() for name, t in tensors.items() if "expert_ids" not in name)


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 16.0}, {"r": 5}, {"use_rslora": True}, {"ranks": None}, {"ranks": {"1": {"3": 3}}}],
    ids=str,
)
def test_other_ranks_and_scales_than_were_saved_are_refused(changes: dict[str, object], delta: Path) -> None:
    change_config(delta, **changes)
    with pytest.raises(CorruptDeltaError, match=r"low_rank: adapter_config.json says .*the tensors were written with"):
        read_delta(delta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r: got 0, expected a whole number of at least 1"),
        ({"r": True}, "r: got True"),
        ({"lora_alpha": -1}, "lora_alpha: got -1, expected a number over 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan"),
        ({"use_rslora": 1}, "use_rslora: got 1, expected true or false"),
        ({"ranks": [4]}, r"ranks: got \[4\]"),
        ({"ranks": {"1": {"4": 2}}}, "ranks of layer 1: .*expected ranks of experts that are selected there"),
        ({"ranks": {"7": {"0": 2}}}, "ranks of layer 7"),
        ({"ranks": {"1": {"3": 0}}}, "ranks of layer 1: .*expected whole numbers of at least 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str, delta: Path) -> None:
    change_config(delta, **changes)
    with pytest.raises(CorruptDeltaError, match=message):
        read_delta(delta)


def wider(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)


def transposed(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].mT.contiguous()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, up: transposed(t, up), "got shapes .*expected 3 experts of rank up to 4"),
        (lambda t, up: wider(t, up.replace("up_A", "up_B")), "got shapes .*with U = F or 2 F"),
        (lambda t, up: t.pop(up), "got tensors .*expected"),
        (lambda t, up: t.update({up: t[up].to(torch.int32)}), "up_A: got dtype I32"),
        (lambda t, up: t.update({up: t[up][:2].clone()}), "got shapes"),
        (lambda t, up: t.update({up.replace("up_A", "left_A"): t[up].clone()}), "got tensors"),
    ],
)
def test_stacks_that_do_not_belong_together_are_refused_without_sums_too(
    spoil: Callable[[dict[str, torch.Tensor], str], object], message: str, delta: Path
) -> None:
    tensors = load_file(delta / "adapter_model.safetensors")
    spoil(tensors, "base_model.model.model.layers.1.mlp.experts.expert_lora_up_A")
    save_file(tensors, delta / "adapter_model.safetensors")
    with pytest.raises(CorruptDeltaError, match=message):
        read_delta(delta)


def test_stacks_of_another_width_than_the_bases_are_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base = metier.load(saved[0])
    wrapped = made_lora(base.model)
    wrapped.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in [name for name in tensors if "up_A" in name or "down_B" in name]:
        tensors[name] = torch.cat([tensors[name]] * 2, dim=2 if "up_A" in name else 1)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    report = verify(tmp_path / "adapter", metier.load(saved[0]))
    assert any(
        "expert_lora_down_B: got shape [3, 64, 4], expected shape [3, 32, 4]" in check.sentence
        for check in report.checks
    )


@pytest.mark.parametrize(
    ("action", "what"),
    [
        (lambda delta, base, out: compress(delta, base, out, method="bf16"), "compression"),
        (lambda delta, base, out: compose([delta], base, out), "composition"),
        (lambda delta, base, out: write_esft_checkpoint(delta, base, out), "an ESFT checkpoint"),
    ],
)
def test_what_needs_whole_rows_refuses_a_lora_by_name(
    action: Callable[[Path, Path, Path], object], what: str, saved: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(DeltaError, match=f"got a delta of type EXPERT_LORA, but {what} needs one of type ESFT"):
        action(saved[1], saved[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
